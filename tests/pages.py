"""What a page must look like in a browser."""


def assert_sound(seen, width):
    """Every figure is there, labelled and legible; nothing was asked of elsewhere."""
    assert seen["complaints"] == []
    assert [url for url in seen["requests"] if not url.startswith("data:")] == [
        url for url in seen["requests"] if url.startswith("file:")
    ]
    assert sum(url.startswith("file:") for url in seen["requests"]) == 1
    assert seen["width"] <= width
    assert seen["twice"] == []
    for figure in seen["figures"]:
        assert figure["sizes"], figure
        assert min(min(size) for size in figure["sizes"]) > 10, figure
        assert figure["loaded"] and figure["labelled"] and figure["caption"], figure
        assert figure["clashes"] == [] and figure["outside"] == [], figure
        assert not any("$" in text for text in figure["texts"]), figure
        if figure["svg"]:  # ticks and the names of both axes
            assert sum(any(c.isalpha() for c in t) for t in figure["texts"]) >= 2


def names(seen):
    return {figure["id"] for figure in seen["figures"]}
