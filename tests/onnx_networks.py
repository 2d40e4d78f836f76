"""Small ONNX networks, their graphs as the exporters write them.

`FAMILIES` has a maker for each: of a model with an open batch, or a fixed one. Those in
`WITHOUT_BATCH_NORMS` have none.
"""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

SIZE, CLASSES = 16, 5
FAMILIES = {}
WITHOUT_BATCH_NORMS = ("convnext",)


def family(make):
    FAMILIES[make.__name__] = make
    return make


class Builder:
    """Nodes and weights; every method adds a node and returns its output's name."""

    def __init__(self, seed=0):
        self.nodes, self.weights, self.count = [], [], 0
        self.rng = np.random.default_rng(seed)

    def weight(self, name, array, dtype=np.float32):
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def node(self, operator, *inputs, outputs=1, **attributes):
        self.count += 1
        names = [f"{operator}_{self.count}{'abc'[i]}" for i in range(outputs)]
        name = f"node_{operator}_{self.count}"
        inputs = [self.ints(x) if isinstance(x, list) else x for x in inputs]
        self.nodes.append(
            helper.make_node(operator, inputs, names, name=name, **attributes)
        )
        return names[0] if outputs == 1 else names

    def ints(self, values):
        self.count += 1
        value = numpy_helper.from_array(np.asarray(values, np.int64))
        name = f"val_{self.count}"
        self.nodes.append(helper.make_node("Constant", [], [name], value=value))
        return name

    def number(self, value):
        self.count += 1
        name = f"number_{self.count}"
        array = numpy_helper.from_array(np.asarray(value, np.float32))
        self.nodes.append(helper.make_node("Constant", [], [name], value=array))
        return name

    def conv(self, x, name, ins, out, size=3, *, group=1, bias=False, **attributes):
        shape = (out, ins // group, size, size)
        scale = (2 / (size * size * ins / group)) ** 0.5
        kernel = self.rng.normal(size=shape) * scale
        inputs = [x, self.weight(f"{name}.weight", kernel)]
        if bias:
            inputs.append(self.weight(f"{name}.bias", self.rng.normal(size=out)))
        attributes.setdefault("pads", [size // 2] * 4)
        return self.node("Conv", *inputs, group=group, **attributes)

    def conv_of_dynamo(self, x, name, ins, out, size=3, **attributes):
        """A convolution with zeros for a bias, as torch.export writes it."""
        self.conv(x, name, ins, out, size, **attributes)
        conv = self.nodes.pop()
        shape = self.node("Shape", f"{name}.weight", start=0, end=1)
        shape = self.node("Expand", shape, [1])
        zeros = self.node("CastLike", self.number(0.0), x)
        zeros = self.node("Expand", zeros, shape)
        conv.input.append(zeros)
        self.nodes.append(conv)
        return conv.output[0]

    def norm(self, x, name, count):
        values = {
            "weight": self.rng.uniform(0.5, 1.5, count),
            "bias": self.rng.normal(size=count) * 0.1,
            "running_mean": self.rng.normal(size=count) * 0.2,
            "running_var": self.rng.uniform(0.5, 1.5, count),
        }
        names = [self.weight(f"{name}.{k}", v) for k, v in values.items()]
        return self.node("BatchNormalization", x, *names, epsilon=1e-5)

    def layer(self, x, name, ins, out, size=3, act="Relu", **attributes):
        """A convolution, a batch norm and a nonlinearity."""
        x = self.conv(x, name, ins, out, size, **attributes)
        x = self.norm(x, f"{name}_bn", out)
        return self.node(act, x) if act else x

    def head(self, x, count):
        """A linear layer on features [B, count]."""
        scale = self.rng.normal(size=(CLASSES, count)) * 0.5
        inputs = [self.weight("fc.weight", scale)]
        inputs.append(self.weight("fc.bias", self.rng.normal(size=CLASSES)))
        return self.node("Gemm", x, *inputs, transB=1)

    def pooled(self, x, count):
        """Global pooling and the linear layer, as the older exporter writes them."""
        return self.head(self.node("Flatten", self.node("GlobalAveragePool", x)), count)

    def pooled_of_dynamo(self, x, count, batch):
        """The same as torch.export writes it."""
        axes = self.node("Reshape", [-1, -2], [-1])
        x = self.node("ReduceMean", x, axes, keepdims=1)
        if batch:
            shape = [batch, count]
        else:
            size = self.node("Squeeze", self.node("Shape", "x", start=0, end=1))
            shape = self.node("Reshape", size, [-1])
            shape = self.node("Concat", shape, [count], axis=0)
        return self.head(self.node("Reshape", x, shape, allowzero=1), count)

    def model(self, output, batch=0, opset=18, shape=(3, SIZE, SIZE), out=None):
        value = helper.make_tensor_value_info
        sizes = [batch or "batch", *shape]
        result = [batch or "batch", *(out or [CLASSES])]
        graph = helper.make_graph(
            self.nodes,
            "main_graph",
            [value("x", TensorProto.FLOAT, sizes)],
            [value(output, TensorProto.FLOAT, result)],
            self.weights,
        )
        opsets = [helper.make_opsetid("", opset)]
        version = 10 if opset >= 21 else 8
        return helper.make_model(graph, opset_imports=opsets, ir_version=version)


@family
def resnet(batch=0, opset=18):
    """With a shortcut, of torch.export."""
    b = Builder()
    x = b.conv_of_dynamo("x", "conv1", 3, 8)
    x = b.node("Relu", b.norm(x, "bn1", 8))
    x = b.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = b.conv_of_dynamo(x, "layer1.conv1", 8, 8)
    y = b.node("Relu", b.norm(y, "layer1.bn1", 8))
    y = b.conv_of_dynamo(y, "layer1.conv2", 8, 8)
    x = b.node("Relu", b.node("Add", b.norm(y, "layer1.bn2", 8), x))
    return b.model(b.pooled_of_dynamo(x, 8, batch), batch, opset)


@family
def mobilenet_v2(batch=0, opset=18):
    """Depthwise convolutions and ReLU6."""
    b = Builder()
    x = b.layer("x", "features.0", 3, 8, act=None, strides=[2, 2])
    x = b.node("Clip", x, b.number(0.0), b.number(6.0))
    y = b.layer(x, "features.1", 8, 8, act=None, group=8)
    y = b.node("Clip", y, b.number(0.0), b.number(6.0))
    x = b.node("Add", x, b.layer(y, "features.2", 8, 8, 1, act=None))
    x = b.node("Identity", x)
    return b.model(b.pooled(x, 8), batch, opset)


@family
def mobilenet_v3(batch=0, opset=18):
    """Hard-swish and squeeze-and-excitation."""
    b = Builder()
    x = b.layer("x", "stem", 3, 8, act="HardSwish", strides=[2, 2])
    s = b.node("GlobalAveragePool", x)
    s = b.node("Relu", b.conv(s, "se.fc1", 8, 4, 1, bias=True, pads=[0, 0, 0, 0]))
    s = b.conv(s, "se.fc2", 4, 8, 1, bias=True, pads=[0, 0, 0, 0])
    x = b.node("Mul", b.node("HardSigmoid", s, alpha=1 / 6), x)
    x = b.layer(x, "head", 8, 12, 1, act="HardSwish")
    return b.model(b.pooled(x, 12), batch, opset)


@family
def efficientnet_lite(batch=0, opset=18):
    """TensorFlow's padding, computed from the shape as timm does."""
    b = Builder()
    height = b.node("Gather", b.node("Shape", "x"), b.ints(2), axis=0)
    size = b.node("Cast", height, to=TensorProto.FLOAT)
    out = b.node("Ceil", b.node("Div", size, b.number(2.0)))
    whole = b.node("Mul", b.node("Sub", out, b.number(1.0)), b.number(2.0))
    pad = b.node("Sub", b.node("Add", whole, b.number(3.0)), size)
    pad = b.node("Cast", b.node("Max", pad, b.number(0.0)), to=TensorProto.INT64)
    before = b.node("Div", pad, b.ints(2))
    after = b.node("Sub", pad, before)
    ends = [b.node("Unsqueeze", e, [0]) for e in (before, before, after, after)]
    zeros = b.node("ConstantOfShape", [2])
    zeros = b.node("Cast", zeros, to=TensorProto.INT64)
    pads = b.node("Concat", zeros, *ends[:2], zeros, *ends[2:], axis=0)
    x = b.node("Pad", "x", pads, b.number(0.0), mode="constant")
    x = b.layer(x, "conv_stem", 3, 8, act=None, strides=[2, 2], pads=[0, 0, 0, 0])
    x = b.node("Clip", x, b.number(0.0), b.number(6.0))
    return b.model(b.pooled(x, 8), batch, opset)


@family
def regnet(batch=0, opset=18):
    """Grouped convolutions and a sigmoid."""
    b = Builder()
    x = b.layer("x", "stem", 3, 8, strides=[2, 2])
    y = b.layer(x, "block.a", 8, 8, group=2)
    s = b.conv(b.node("GlobalAveragePool", y), "block.se", 8, 8, 1, bias=True)
    y = b.node("Mul", y, b.node("Sigmoid", s))
    x = b.node("Relu", b.node("Add", b.layer(y, "block.b", 8, 8, 1, None), x))
    return b.model(b.pooled(x, 8), batch, opset)


@family
def densenet(batch=0, opset=18):
    """Batch norms before convolutions, concatenation, average pooling."""
    b = Builder()
    x = b.conv("x", "conv0", 3, 6, strides=[2, 2])
    y = b.conv(b.node("Relu", b.norm(x, "norm1", 6)), "conv1", 6, 4)
    x = b.node("Concat", x, y, axis=1)
    x = b.conv(b.node("Relu", b.norm(x, "norm2", 10)), "conv2", 10, 6, 1)
    x = b.node("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = b.node("Relu", b.norm(x, "norm3", 6))
    return b.model(b.pooled(x, 6), batch, opset)


@family
def vgg(batch=0, opset=18):
    """Biases, a pooling that rounds up, dropout, several linear layers."""
    b = Builder()
    x = b.layer("x", "features.0", 3, 8, bias=True)
    x = b.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    x = b.layer(x, "features.1", 8, 4, bias=True, strides=[4, 4])
    x = b.node("Flatten", x)
    x = b.node("Dropout", x)
    return b.model(b.head(x, 16), batch, opset)


@family
def shufflenet(batch=0, opset=18):
    """Channels split in a sequence and shuffled, of torch.export."""
    b = Builder()
    x = b.layer("x", "stem", 3, 8, strides=[2, 2])
    parts = b.node("SplitToSequence", x, b.ints(4), axis=1, keepdims=1)
    one, two = (b.node("SequenceAt", parts, b.ints(i)) for i in (0, 1))
    x = b.node("Concat", one, b.layer(two, "branch", 4, 4), axis=1)
    first = [batch] if batch else b.node("Shape", "x", start=0, end=1)
    first = b.ints(first) if batch else first
    shape = b.node("Concat", first, [2], [4], [8], [8], axis=0)
    x = b.node("Transpose", b.node("Reshape", x, shape), perm=[0, 2, 1, 3, 4])
    x = b.node("Reshape", x, b.node("Concat", first, [8, 8, 8], axis=0))
    x = b.layer(x, "conv5", 8, 8, 1)
    return b.model(b.pooled_of_dynamo(x, 8, batch), batch, opset)


@family
def shufflenet_older(batch=0, opset=18):
    """The same of the older exporter: slices whose ends are computed."""
    b = Builder()
    x = b.layer("x", "stem", 3, 8, strides=[2, 2])
    channels = b.node("Gather", b.node("Shape", x), b.ints(1), axis=0)
    half = b.node("Div", b.node("Add", channels, b.ints(1)), b.ints(2))
    middle = b.node("Unsqueeze", half, [0])
    end = b.node("Unsqueeze", b.node("Mul", half, b.ints(2)), [0])
    one = b.node("Slice", x, [0], middle, [1])
    two = b.node("Slice", x, middle, end, [1])
    x = b.node("Concat", one, b.layer(two, "branch", 4, 4), axis=1)
    x = b.node("Reshape", x, [batch or -1, 2, 4, 8, 8])
    x = b.node("Transpose", x, perm=[0, 2, 1, 3, 4])
    x = b.node("Reshape", x, [batch or -1, 8, 8, 8])
    x = b.layer(x, "conv5", 8, 8, 1)
    x = b.node("ReduceMean", x, [2, 3], keepdims=0)
    return b.model(b.head(x, 8), batch, opset)


@family
def keras(batch=0, opset=18):
    """Images NHWC, transposed at once, and a softmax at the end."""
    b = Builder()
    x = b.node("Transpose", "x", perm=[0, 3, 1, 2])
    x = b.node(
        "Conv",
        x,
        b.weight("k", b.rng.normal(size=(8, 3, 3, 3)) * 0.3),
        auto_pad="SAME_UPPER",
        strides=[2, 2],
    )
    x = b.node("Relu", b.norm(x, "StatefulPartitionedCall/model/bn", 8))
    x = b.node("Squeeze", b.node("GlobalAveragePool", x), [2, 3])
    x = b.node("MatMul", x, b.weight("dense", b.rng.normal(size=(8, CLASSES))))
    x = b.node("Add", x, b.weight("dense_bias", b.rng.normal(size=CLASSES)))
    return b.model(b.node("Softmax", x), batch, opset, (SIZE, SIZE, 3))


@family
def convnext(batch=0, opset=18):
    """Layer norms, GELU of Erf, layer scale, as_strided; the second form's norms."""
    b = Builder()

    def layer_norm(x, name, count):
        x = b.node("Transpose", x, perm=[0, 2, 3, 1])
        scale = b.weight(f"{name}.weight", b.rng.uniform(0.5, 1.5, count))
        bias = b.weight(f"{name}.bias", b.rng.normal(size=count) * 0.1)
        return b.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-6)

    def linear(x, name, ins, out):
        kernel = b.weight(f"{name}.weight", b.rng.normal(size=(out, ins)) * 0.5)
        x = b.node("MatMul", x, b.node("Transpose", kernel, perm=[1, 0]))
        return b.node("Add", x, b.weight(f"{name}.bias", b.rng.normal(size=out)))

    def gelu(x):
        y = b.node("Erf", b.node("Div", x, b.number(2**0.5)))
        y = b.node("Mul", x, b.node("Add", y, b.number(1.0)))
        return b.node("Mul", y, b.number(0.5))

    def back(x):
        return b.node("Transpose", x, perm=[0, 3, 1, 2])

    stem = {"bias": True, "strides": [4, 4], "pads": [0] * 4}
    x = back(layer_norm(b.conv("x", "stem", 3, 8, 4, **stem), "stem_norm", 8))
    y = b.conv(x, "block.dw", 8, 8, 7, group=8, bias=True)
    y = gelu(linear(layer_norm(y, "block.norm", 8), "block.fc1", 8, 16))
    size = b.node("ReduceL2", y, [1, 2], keepdims=1)
    mean = b.node("ReduceMean", size, [-1], keepdims=1)
    share = b.node("Div", size, b.node("Add", mean, b.number(1e-6)))
    y = b.node("Add", y, b.node("Mul", y, share))
    y = back(linear(y, "block.fc2", 16, 8))
    y = b.node("Mul", b.weight("layer_scale", b.rng.normal(size=(8, 1, 1))), y)
    x = b.node("Add", y, x)
    x = b.node("ReduceMean", x, [-1, -2], keepdims=1)
    if batch:
        places = b.ints(np.arange(batch * 8).reshape(batch, 8, 1, 1))
    else:
        size = b.node("Squeeze", b.node("Shape", "x", start=0, end=1))
        zero, one = b.ints(0), b.ints(1)
        places = b.node("Mul", b.node("Range", zero, size, one), b.ints(8))
        places = b.node("Unsqueeze", places, [1, 2, 3])
        inner = b.node("Unsqueeze", b.node("Range", zero, b.ints(8), one), [0, 2, 3])
        places = b.node("Add", places, inner)
    x = b.node("Gather", b.node("Reshape", x, [-1]), places, axis=0)
    x = b.node("Flatten", back(layer_norm(x, "norm", 8)))
    return b.model(b.head(x, 8), batch, opset)


@family
def feature_pyramid(batch=0, opset=18):
    """Maps of two sizes, one of them resized; sizes as torch.export computes them."""
    b = Builder()
    x = b.layer("x", "stem", 3, 8, strides=[2, 2])
    y = b.layer(x, "down", 8, 8, strides=[2, 2])
    twice = b.weight("twice", [1, 1, 2, 2])
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    x = b.node("Add", x, b.node("Resize", y, "", twice, mode="nearest", **how))
    x = b.layer(x, "both", 8, 8)
    first = [batch, 8] if batch else b.node("Shape", x, start=0, end=2)
    first = b.ints(first) if batch else first
    sizes = b.node("Concat", first, [6, 11], axis=0)
    x = b.node("Resize", x, "", "", sizes, mode="linear")
    x = b.layer(x, "last", 8, 8)
    return b.model(b.pooled(x, 8), batch, opset)


def images(count, layout="NHWC"):
    x = np.random.default_rng(count).normal(size=(count, SIZE, SIZE, 3))
    x = x.astype(np.float32)
    return x if layout == "NHWC" else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
