"""A Hugging Face Hub in a folder, and its cache in another."""

import json
import shutil

import httpx2
import huggingface_hub
import numpy as np
import safetensors.numpy
from huggingface_hub import constants, errors

COMMIT = "0123456789abcdef" * 2 + "01234567"
# As timm writes it.
TIMM = {
    "architecture": "efficientnet_lite0",
    "num_classes": 5,
    "num_features": 1280,
    "global_pool": "avg",
    "model_args": {"num_classes": 5, "in_chans": 3},
    "pretrained_cfg": {
        "tag": "ra_in1k",
        "input_size": [3, 192, 160],
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.25, 0.25, 0.5],
        "num_classes": 5,
        "classifier": "classifier",
    },
}


class Hub:
    """Repositories in a folder; `online` says whether they can be reached.

    refusal: an error of huggingface_hub.errors that every request ends in, or None.
    """

    def __init__(self, folder, monkeypatch):
        self.folder, self.cache = folder / "hub", folder / "cache"
        self.online, self.refusal, self.fetched = True, None, []
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.cache))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def write(self, repository, config=None, weights=None, **files):
        """Write a repository; weights: a state dict, for model.safetensors."""
        place = self.folder / repository
        place.mkdir(parents=True, exist_ok=True)
        named = {name.replace("_json", ".json"): x for name, x in files.items()}
        for name, value in {"config.json": config, **named}.items():
            if value is not None:
                (place / name).write_text(json.dumps(value))
        if weights is not None:
            safetensors.numpy.save_file(weights, place / "model.safetensors")
        return place

    def download(self, repo_id, filename, *, revision=None):
        response = httpx2.Response(404, request=httpx2.Request("HEAD", "https://hf.co"))
        if not self.online:
            raise errors.LocalEntryNotFoundError("An error happened\nwhile trying")
        if self.refusal:
            raise self.refusal("Client Error.\n\nFor url", response=response)
        if not (self.folder / repo_id).is_dir():
            raise errors.RepositoryNotFoundError("404", response=response)
        if revision not in (None, "main", COMMIT):
            raise errors.RevisionNotFoundError("404", response=response)
        if not (self.folder / repo_id / filename).is_file():
            raise errors.RemoteEntryNotFoundError("404", response=response)
        self.fetched.append(filename)
        place = self.cache / f"models--{repo_id.replace('/', '--')}"
        found = place / "snapshots" / COMMIT / filename
        found.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / repo_id / filename, found)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(COMMIT)
        return str(found)


def state_dict(model, scheme, classes=5):
    """Zeros for every variable of a network, and variances of 1."""
    from adadfq_jax.teacher import naming

    shapes = naming.shapes(model, classes, (32, 32, 3))
    arrays = {}
    for key, path in naming.keys(model, scheme, shapes).items():
        shape = shapes[path].shape
        shape = (*shape[::-1][:2], *shape[:-2]) if len(shape) > 1 else shape
        fill = np.ones if path[-1] in ("var", "scale") else np.zeros
        arrays[key] = fill(shape, np.float32)
    return arrays
