"""Makes the models of this folder, and checks raised models in onnxruntime.

    make.py models DIR [--all]    write the models; --all: every case, also inside If bodies and functions
    AMAX_OPSET_CASES=DIR AMAX_OPSET_TO=13,18,21 cargo test --test it opset::raise_folder -- --ignored
    make.py check DIR [PREFIX]    onnx.checker with full check, and outputs on random inputs before and after

Needs onnx, onnxruntime and numpy. `check` fails on a difference above 1e-6 that TOLERATED does not name.
"""

import glob
import os
import sys

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

F, I, B, D = T.FLOAT, T.INT64, T.BOOL, T.DOUBLE
IR = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10}
CASES = {}
RANGES = {}


def n(op, inputs, outputs, **attrs):
    split = lambda names: names.split() if isinstance(names, str) else names
    inputs, outputs = ([("" if x == "_" else x) for x in split(v)] for v in (inputs, outputs))
    return h.make_node(op, inputs, outputs, name=f"n_{outputs[0]}", **attrs)


def case(name, opset, nodes, inputs, outputs, inits=None, infos=None, keep=False, ranges=None, wrap=True, functions=()):
    """`inputs` and `infos`: name → shape, or (type, shape). `outputs`: names, or name → (type, shape)."""
    typed = lambda v: v if isinstance(v, tuple) and len(v) == 2 and isinstance(v[1], (list, type(None))) else (F, v)
    info = lambda d: [h.make_tensor_value_info(k, *typed(v)) for k, v in d.items()]
    outputs = outputs if isinstance(outputs, dict) else {o: (F, None) for o in outputs.split()}
    nodes = nodes if isinstance(nodes, list) else [nodes]
    inits = [nh.from_array(v, k) for k, v in (inits or {}).items()]
    listed = info({i.name: (i.data_type, list(i.dims)) for i in inits}) if IR[opset] < 4 else []
    graph = h.make_graph(nodes, "g", info(inputs) + listed, info(outputs), inits, value_info=info(infos or {}))
    imports = [h.make_opsetid("", opset)]
    if functions:
        imports.append(h.make_opsetid("local", 1))
    model = h.make_model(graph, opset_imports=imports, ir_version=8 if functions else IR[opset], functions=list(functions))
    name = f"{name}_{opset}"
    assert name not in CASES, name
    RANGES.update({(name, k): v for k, v in (ranges or {}).items()})
    shape_outputs(model, name)
    CASES[name] = (model, keep, wrap and not functions)


def shape_outputs(model, name):
    """Declares the shapes of outputs, which the checker asks for: symbolic, of the rank that onnxruntime finds."""
    import onnxruntime as ort

    if all(o.type.tensor_type.HasField("shape") for o in model.graph.output):
        return
    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        found = ort.InferenceSession(model.SerializeToString(), options).run(None, sample(model, name, 0))
        ranks = [np.ndim(v) for v in found]
    except Exception:
        ranks = [len(model.graph.input[0].type.tensor_type.shape.dim)] * len(model.graph.output)
    for o, rank in zip(model.graph.output, ranks):
        shape = [f"{o.name}{i}" for i in range(rank)]
        o.CopyFrom(h.make_tensor_value_info(o.name, o.type.tensor_type.elem_type, shape))


def in_if(model):
    """The same graph as both branches of an If that captures the inputs; initializers move into the branches."""
    m = onnx.ModelProto()
    m.CopyFrom(model)
    g = m.graph
    own = {i.name for i in g.initializer}
    inputs = [i for i in g.input if i.name not in own]
    branches = []
    for tag in ("a", "b"):
        b = h.make_graph(list(g.node), tag, [], list(g.output), list(g.initializer), value_info=list(g.value_info))
        made = {o for x in b.node for o in x.output if o} | own
        for x in b.node:
            x.name = f"{tag}_{x.name}"
            x.input[:] = [f"{tag}_{v}" if v in made else v for v in x.input]
            x.output[:] = [f"{tag}_{v}" if v else v for v in x.output]
        for v in list(b.output) + list(b.initializer) + list(b.value_info):
            v.name = f"{tag}_{v.name}" if v.name in made else v.name
        branches.append(b)
    cond = h.make_tensor_value_info("cond", B, [])
    node = h.make_node("If", ["cond"], [o.name for o in g.output], name="if", then_branch=branches[0], else_branch=branches[1])
    graph = h.make_graph([node], "g", inputs + [cond], list(g.output))
    return h.make_model(graph, opset_imports=list(m.opset_import), ir_version=max(4, m.ir_version))


def in_function(model):
    """The same graph as a function."""
    g = model.graph
    own = {i.name for i in g.initializer}
    inputs = [i for i in g.input if i.name not in own]
    constants = [h.make_node("Constant", [], [i.name], value=i) for i in g.initializer]
    outputs = [o.name for o in g.output]
    f = h.make_function("local", "f", [i.name for i in inputs], outputs, constants + list(g.node), list(model.opset_import))
    node = h.make_node("f", [i.name for i in inputs], outputs, name="call", domain="local")
    graph = h.make_graph([node], "g", inputs, list(g.output))
    imports = list(model.opset_import) + [h.make_opsetid("local", 1)]
    return h.make_model(graph, opset_imports=imports, ir_version=8, functions=[f])


def f32(*v):
    return np.array(v, np.float32)


def i64(*v):
    return np.array(v, np.int64)


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def squeeze_reduce_split():
    for op, shape, axes in [("Squeeze", [1, 3, 1, 4], [0, 2]), ("Squeeze", [1, 3, 1, 4], [2]), ("Unsqueeze", [3, 4], [0, 3])]:
        for v in (7, 11, 12):
            case(f"{op.lower()}{len(axes)}", v, n(op, "x", "y", axes=axes), {"x": shape}, "y", keep=v == 11 and len(axes) == 2)
    case("squeeze_negative", 11, n("Squeeze", "x", "y", axes=[-2]), {"x": [2, 3, 1, 4]}, "y")
    case("unsqueeze_negative", 11, n("Unsqueeze", "x", "y", axes=[-1, -4]), {"x": [2, 3]}, "y")
    for v in (7, 11, 12):
        case("squeeze_all", v, n("Squeeze", "x", "y"), {"x": [1, 3, 1, 4]}, "y", keep=v == 11)
    for op in ("Sum", "L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare"):
        for v in (7, 11, 12) if op in ("Sum", "Max") else (8, 11):
            kw = {"ranges": {"x": (0.1, 2.0)}} if op == "LogSum" else {}
            case(f"reduce_{op.lower()}", v, n("Reduce" + op, "x", "y", axes=[1, 2]), {"x": [2, 3, 4]}, "y", keep=v == 11 and op in ("Sum", "Mean"), **kw)
            case(f"reduce_{op.lower()}_flat", v, n("Reduce" + op, "x", "y", axes=[0], keepdims=0), {"x": [2, 3, 4]}, "y", **kw)
            case(f"reduce_{op.lower()}_all", v, n("Reduce" + op, "x", "y"), {"x": [2, 3, 4]}, "y", keep=v == 11 and op == "Sum", **kw)
    case("reduce_max", 13, n("ReduceMax", "x", "y", axes=[-1]), {"x": [2, 3, 4]}, "y")
    case("reduce_mean", 17, n("ReduceMean", "x", "y", axes=[-1], keepdims=1), {"x": [2, 3, 4]}, "y")
    for v in (7, 11, 12):
        case("split", v, n("Split", "x", "y z", axis=1, split=[1, 3]), {"x": [2, 4]}, "y z", keep=v == 11)
        case("split_equal", v, n("Split", "x", "y z w", axis=-1 if v > 10 else 1), {"x": [2, 6]}, "y z w", keep=v == 11)
    case("split_equal", 13, n("Split", "x", "y z"), {"x": [4, 6]}, "y z")
    case("split_input", 13, n("Split", "x s", "y z"), {"x": [4, 6]}, "y z", {"s": i64(1, 3)}, keep=True)


def softmax():
    shapes = {2: [3, 4], 3: [2, 3, 4], 4: [2, 3, 2, 2]}
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        low = op.lower()
        for rank, shape in shapes.items():
            for v in (7, 11):
                case(f"{low}_r{rank}_default", v, n(op, "x", "y"), {"x": shape}, "y", keep=v == 11 and (op, rank) in (("Hardmax", 3), ("Softmax", 2)))
            for axis in range(rank):
                case(f"{low}_r{rank}_axis{axis}", 11, n(op, "x", "y", axis=axis), {"x": shape}, {"y": (F, shape)}, keep=op == "Softmax" and rank == 4 and axis == 2)
                case(f"{low}_r{rank}_axis{axis}_dynamic", 11, n(op, "x", "y", axis=axis), {"x": [f"d{i}" for i in range(rank)]}, "y")
            for axis in range(-rank, 0):
                case(f"{low}_r{rank}_minus{-axis}", 11, n(op, "x", "y", axis=axis), {"x": shape}, "y")
        case(f"{low}_trailing_ones", 11, n(op, "x", "y", axis=1), {"x": [2, 5, 1, 1]}, "y", keep=op == "Softmax")
        case(f"{low}_leading_ones", 11, n(op, "x", "y", axis=1), {"x": [2, 1, 1, 5]}, "y", keep=op == "LogSoftmax")
        case(f"{low}_negative_ones", 11, n(op, "x", "y", axis=-3), {"x": [2, 1, 5, 1]}, "y")
        nodes = [n("Transpose", "x", "t", perm=[0, 2, 1]), n(op, "t", "s", axis=1), n("Relu", "s", "y"), n("Neg", "s", "z")]
        case(f"{low}_inner", 11, nodes, {"x": [2, 3, 4]}, "y z")
        nodes = [n("Flatten", "x", "t"), n(op, "t", "y", axis=1)]
        case(f"{low}_unknown_rank", 9, nodes, {"x": [2, 3, 4]}, "y", keep=op == "Softmax")
        case(f"{low}_same_output", 9, [n(op, "x", "y"), n("Abs", "y", "z")], {"x": [2, 3, 4]}, "y z")


def clip():
    for v in (7, 9, 10):
        case("clip", v, n("Clip", "x", "y", min=-0.5, max=0.5), {"x": [20]}, "y", keep=v == 9)
        case("clip_min", v, n("Clip", "x", "y", min=0.0), {"x": [20]}, "y", keep=v == 9)
        case("clip_max", v, n("Clip", "x", "y", max=0.25), {"x": [20]}, "y", keep=v == 9)
        case("clip_none", v, n("Clip", "x", "y"), {"x": [20]}, "y")
        case("clip_limits", v, n("Clip", "x", "y", min=-3.4028234663852886e38, max=3.4028234663852886e38), {"x": [20]}, "y", keep=v == 10)
    chain = [n("Conv", "x w", "c"), n("Clip", "c", "k", min=0.0, max=6.0), n("Transpose", "k", "t"), n("Clip", "t", "y", max=3.0)]
    case("clip_untyped", 9, chain, {"x": [1, 2, 4, 4]}, "y", {"w": random(3, 2, 1, 1)}, keep=True)
    nodes = [n("Cast", "x", "h", to=T.DOUBLE), n("Cast", "h", "c", to=F), n("Clip", "c", "y", min=0.1)]
    case("clip_after_cast", 9, nodes, {"x": [20]}, "y")
    case("clip_shared_name", 9, [n("Neg", "x", "n_y.min"), n("Clip", "n_y.min", "y", min=0.0)], {"x": [20]}, "y")


def pad_slice_topk():
    for v in (7, 9, 10):
        case("pad", v, n("Pad", "x", "y", pads=[0, 1, 2, 0]), {"x": [3, 4]}, "y")
        case("pad_value", v, n("Pad", "x", "y", pads=[1, 0, 0, 1], value=1.5), {"x": [3, 4]}, "y", keep=v == 9)
        case("pad_crop", v, n("Pad", "x", "y", pads=[0, -1, 0, 1]), {"x": [3, 4]}, "y")
        for mode in ("reflect", "edge"):
            case(f"pad_{mode}", v, n("Pad", "x", "y", pads=[0, 1, 1, 1], mode=mode, value=3.0), {"x": [3, 4]}, "y", keep=v == 9 and mode == "edge")
    for mode in ("reflect", "edge", "constant"):
        case(f"pad_{mode}_input", 11, n("Pad", "x p v", "y", mode=mode), {"x": [3, 4]}, "y", {"p": i64(0, 1, 1, 1), "v": np.float32(2)})
    for v in (7, 9):
        case("slice", v, n("Slice", "x", "y", starts=[1, 0], ends=[3, -1], axes=[0, 2]), {"x": [4, 3, 5]}, "y", keep=v == 9)
        case("slice_no_axes", v, n("Slice", "x", "y", starts=[1, -2], ends=[1000, 2147483647]), {"x": [4, 3, 5]}, "y", keep=v == 9)
        case("slice_huge", v, n("Slice", "x", "y", starts=[-100], ends=[9223372036854775807], axes=[1]), {"x": [4, 3, 5]}, "y")
        case("topk", v, n("TopK", "x", "y i", k=2), {"x": [3, 5]}, {"y": (F, None), "i": (I, None)}, keep=v == 9)
        case("topk_axis", v, n("TopK", "x", "y i", k=3, axis=0), {"x": [3, 5]}, {"y": (F, None), "i": (I, None)})
    case("topk", 10, n("TopK", "x k", "y i", axis=-1), {"x": [3, 5]}, {"y": (F, None), "i": (I, None)}, {"k": i64(2)})


def normalization():
    stats = {"s": f32(1, 2, 0.5), "b": f32(0, 1, -1), "m": f32(0.1, 0.2, 0.3), "v": f32(1, 2, 3)}
    for v in (7, 8, 9, 12, 13):
        attrs = {"spatial": 1} if v < 9 else {}
        case("batchnorm", v, n("BatchNormalization", "x s b m v", "y", epsilon=1e-3, **attrs), {"x": [2, 3, 4, 4]}, "y", stats, keep=v == 7)
    case("batchnorm_outputs", 9, n("BatchNormalization", "x s b m v", "y m1 v1 m2 v2"), {"x": [2, 3, 4, 4]}, "y", stats, keep=True, wrap=False)
    case("batchnorm_training", 9, n("BatchNormalization", "x s b m v", "y m1 v1 m2 v2"), {"x": [2, 3, 4, 4]}, "y m1", stats, keep=True, wrap=False)
    flat = {k: np.ones([3, 2], np.float32) for k in "sbmv"}
    case("batchnorm_per_element", 7, n("BatchNormalization", "x s b m v", "y", spatial=0), {"x": [2, 3, 2]}, "y", flat, keep=True, wrap=False)
    for v in (7, 9, 10, 11):
        case("dropout", v, n("Dropout", "x", "y", ratio=0.3), {"x": [3, 4]}, "y", keep=v == 7)
    for v in (7, 9, 10, 11):
        kind = F if v < 10 else B
        case("dropout_mask", v, n("Dropout", "x", "y k"), {"x": [3, 4]}, {"y": (F, None), "k": (kind, [3, 4])}, keep=v in (7, 10))
        case("dropout_unused_mask", v, n("Dropout", "x", "y k"), {"x": [3, 4]}, "y", infos={"k": (kind, [3, 4])}, keep=v == 7)
    for v in (18, 20):
        case("groupnorm", v, n("GroupNormalization", "x s b", "y", num_groups=2), {"x": [2, 6, 3]}, "y", {"s": f32(1, 2), "b": f32(0, -1)}, keep=v == 18)
        case("groupnorm_dynamic", v, n("GroupNormalization", "x s b", "y", num_groups=2), {"x": ["n", "c", 3], "s": [2], "b": [2]}, "y", keep=v == 18)
        nodes = [n("GroupNormalization", "x s b", "t", num_groups=2), n("GroupNormalization", "t s b", "y", num_groups=2)]
        case("groupnorm_shared", v, nodes, {"x": [2, 6, 3]}, "y", {"s": f32(1, 2), "b": f32(0, -1)}, infos={"t": [2, 6, 3]})
    for v in (7, 9, 13):
        case("instancenorm", v, n("InstanceNormalization", "x s b", "y"), {"x": [2, 3, 4]}, "y", {"s": f32(1, 2, 3), "b": f32(0, 1, 2)})
        case("lrn", v, n("LRN", "x", "y", size=3), {"x": [2, 5, 4, 4]}, "y")
    for across in (0, 1):
        case(f"mvn_{across}", 7, n("MeanVarianceNormalization", "x", "y", across_channels=across), {"x": [1, 3, 4, 4]}, "y", keep=across == 0, wrap=False)
        case(f"mvn_batch_{across}", 7, n("MeanVarianceNormalization", "x", "y", across_channels=across), {"x": [2, 3, 4, 4]}, "y", wrap=False)
    case("mvn", 9, n("MeanVarianceNormalization", "x", "y"), {"x": [2, 3, 4, 4]}, "y")
    for v in (7, 9):
        case("imagescaler", v, n("ImageScaler", "x", "y", scale=0.5, bias=[1.0, 2.0, 3.0]), {"x": [2, 3, 4, 4]}, "y", keep=v == 7, wrap=False)
        case("crop", v, n("Crop", "x", "y", border=[1, 1, 1, 1]), {"x": [2, 3, 4, 4]}, "y", keep=v == 7, wrap=False)


def resize():
    scalings = {"up": [1, 1, 2, 3], "up_odd": [1, 1, 1.5, 2.3], "down": [1, 1, 0.5, 0.4], "mixed": [1, 1, 2, 0.6], "same": [1, 1, 1, 1]}
    for tag, s in scalings.items():
        for mode in ("nearest", "linear"):
            if min(s) >= 1:
                for v in (7, 8):
                    case(f"upsample_{mode}_{tag}", v, n("Upsample", "x", "y", mode=mode, scales=[float(k) for k in s]), {"x": [1, 2, 5, 7]}, "y", keep=v == 7 and tag == "up_odd")
                case(f"upsample_{mode}_{tag}", 9, n("Upsample", "x s", "y", mode=mode), {"x": [1, 2, 5, 7]}, "y", {"s": f32(*s)}, keep=tag == "up" and mode == "linear")
            case(f"resize_{mode}_{tag}", 10, n("Resize", "x s", "y", mode=mode), {"x": [1, 2, 5, 7]}, "y", {"s": f32(*s)}, keep=tag in ("down", "mixed", "up"))
    for down in ([1, 1, 0.3, 0.7], [1, 1, 0.25, 0.9], [1, 0.5, 0.5, 0.5], [0.5, 1, 3, 0.34]):
        case(f"resize_nearest_{'_'.join(map(str, down))}", 10, n("Resize", "x s", "y", mode="nearest"), {"x": [2, 4, 9, 11]}, "y", {"s": f32(*down)})
    nodes = [n("Cast", "s0", "s", to=F), n("Resize", "x s", "y", mode="nearest")]
    case("resize_nearest_computed", 10, nodes, {"x": [1, 2, 5, 7], "s0": (I, [4])}, "y", keep=True, ranges={"s0": "resize"})
    nodes = [n("Constant", [], "s", value=nh.from_array(f32(1, 1, 2, 2))), n("Resize", "x s", "y", mode="nearest")]
    case("resize_nearest_constant_node", 10, nodes, {"x": [1, 2, 5, 7]}, "y")
    for v in (11, 12, 13, 17, 18):
        roi = "_" if v >= 13 else "r"
        extra = {} if v >= 13 else {"r": f32()}
        for mode in ("nearest", "linear", "cubic"):
            for coord in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
                attrs = {"mode": mode, "coordinate_transformation_mode": coord}
                for tag in ("up_odd", "down"):
                    case(f"resize_{mode}_{coord}_{tag}", v, n("Resize", f"x {roi} s", "y", **attrs), {"x": [1, 2, 5, 7]}, "y", {**extra, "s": f32(*scalings[tag])}, wrap=False)
        sizes = {"z": i64(1, 2, 8, 5)}
        if v < 13:
            case("resize_sizes", v, n("Resize", "x r e z", "y", mode="linear"), {"x": [1, 2, 5, 7]}, "y", {"r": f32(), "e": f32(), **sizes}, keep=v == 11)
            case("resize_sizes_constant_node", v, [n("Constant", [], "e", value=nh.from_array(f32())), n("Resize", "x e e z", "y", mode="nearest")], {"x": [1, 2, 5, 7]}, "y", sizes)
            crop = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
            case("resize_crop", v, n("Resize", "x r s", "y", **crop), {"x": [1, 2, 5, 7]}, "y", {"r": f32(0, 0, 0.2, 0.1, 1, 1, 0.8, 0.9), "s": f32(1, 1, 2, 2)}, keep=v == 11)
            tf = {"mode": "nearest", "coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"}
            for tag, s in scalings.items():
                case(f"resize_tf_{tag}", v, n("Resize", "x r s", "y", **tf), {"x": [1, 2, 5, 7]}, "y", {"r": f32(), "s": f32(*s)}, keep=v == 11 and tag == "up")
            tf["nearest_mode"] = "ceil"
            case("resize_tf_ceil", v, n("Resize", "x r s", "y", **tf), {"x": [1, 2, 5, 7]}, "y", {"r": f32(), "s": f32(1, 1, 2, 2)}, keep=v == 11)


def indexing():
    ints = {"i": (0, 3)}
    for v in (9, 10):
        case("scatter", v, n("Scatter", "x i u", "y", axis=1), {"x": [3, 4], "u": [3, 2]}, "y", {"i": np.array([[0, 3], [1, 2], [3, 0]])}, keep=v == 9)
        case("scatter_default", v, n("Scatter", "x i u", "y"), {"x": [3, 4], "u": [1, 4]}, "y", {"i": np.array([[0, 2, 1, 0]])})
    for v in (7, 10, 11, 12):
        case("gather", v, n("Gather", "x i", "y", axis=1), {"x": [3, 4], "i": (I, [2])}, "y", ranges=ints)
        case("argmax", v, n("ArgMax", "x", "y", axis=1), {"x": [3, 4]}, {"y": (I, None)})
        case("flatten", v, n("Flatten", "x", "y", axis=2), {"x": [2, 3, 4]}, "y")
        case("reshape", v, n("Reshape", "x s", "y"), {"x": [2, 3, 4]}, "y", {"s": i64(0, -1)})
        case("tile", v, n("Tile", "x r", "y"), {"x": [2, 3]}, "y", {"r": i64(2, 1)})
    for v in (9, 10, 11):
        case("onehot", v, n("OneHot", "i d v", "y"), {"i": (I, [5])}, "y", {"d": i64(3), "v": f32(0, 1)}, ranges={"i": (-5, 5)})
        case("compress", v, n("Compress", "x c", "y", axis=0), {"x": [3, 4]}, "y", {"c": np.array([True, False, True])})
    for v in (11, 12, 13):
        case("gathernd", v, n("GatherND", "x i", "y"), {"x": [3, 4]}, "y", {"i": np.array([[0, 1], [2, 3]])})
        case("scatternd", v, n("ScatterND", "x i u", "y"), {"x": [3, 4], "u": [2]}, "y", {"i": np.array([[0, 1], [2, 3]])})
    rois = {"x": [1, 2, 8, 8]}
    for v in (10, 15, 16):
        boxes = {"r": f32([0, 0, 5, 5], [1, 2, 7, 6]).reshape(2, 4), "b": i64(0, 0)}
        case("roialign", v, n("RoiAlign", "x r b", "y", output_height=3, output_width=3, sampling_ratio=2), rois, "y", boxes, keep=v == 10)
        case("roialign_max", v, n("RoiAlign", "x r b", "y", mode="max", output_height=2, output_width=2), rois, "y", boxes)
    for v in (16, 19):
        for mode in ("bilinear", "nearest", "bicubic", None):
            attrs = {"mode": mode} if mode else {}
            case(f"gridsample_{mode}", v, n("GridSample", "x g", "y", **attrs), {"x": [1, 2, 4, 4], "g": [1, 3, 3, 2]}, "y", keep=v == 16 and mode in ("bilinear", "bicubic"))
    for v in (17, 19):
        case("dft", v, n("DFT", "x", "y"), {"x": [2, 8, 1]}, "y", keep=v == 17)
        case("dft_axis", v, n("DFT", "x", "y", axis=2, inverse=1), {"x": [2, 3, 8, 2]}, "y")
        case("dft_onesided", v, n("DFT", "x l", "y", axis=1, onesided=1), {"x": [2, 3, 8, 1]}, "y", {"l": i64(4)[0]})


def pooling_and_rest():
    for v in (7, 8, 9, 10, 11, 12, 13, 17):
        for op in ("MaxPool", "AveragePool"):
            attrs = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 1]}
            case(op.lower(), v, n(op, "x", "y", **attrs), {"x": [1, 2, 7, 8]}, "y")
            case(f"{op.lower()}_same", v, n(op, "x", "y", kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER"), {"x": [1, 2, 7, 8]}, "y")
            if v >= 10:
                case(f"{op.lower()}_ceil", v, n(op, "x", "y", **attrs, ceil_mode=1), {"x": [1, 2, 7, 8]}, "y")
            if op == "AveragePool":
                case("averagepool_include", v, n(op, "x", "y", **attrs, count_include_pad=1), {"x": [1, 2, 7, 8]}, "y")
                if v >= 10:
                    case("averagepool_include_ceil", v, n(op, "x", "y", **attrs, count_include_pad=1, ceil_mode=1), {"x": [1, 2, 7, 8]}, "y")
        case("lppool", v, n("LpPool", "x", "y", kernel_shape=[2, 2], strides=[2, 2], p=2), {"x": [1, 2, 6, 6]}, "y")
        case("globallppool", v, n("GlobalLpPool", "x", "y", p=2), {"x": [1, 2, 6, 6]}, "y", keep=v == 7)
        case("gemm", v, n("Gemm", "a b c", "y", alpha=0.5, transB=1), {"a": [2, 3]}, "y", {"b": random(4, 3), "c": f32(1, 2, 3, 4)})
        case("convtranspose", v, n("ConvTranspose", "x w", "y", strides=[2, 2], pads=[1, 0, 1, 1]), {"x": [1, 2, 4, 4]}, "y", {"w": random(2, 3, 3, 3)})
        for auto in ("NOTSET", "SAME_UPPER", "SAME_LOWER"):
            attrs = {"strides": [2, 2], "output_shape": [8, 8], **({} if auto == "NOTSET" else {"auto_pad": auto})}
            case(f"convtranspose_shape_{auto.lower()}", v, n("ConvTranspose", "x w", "y", **attrs), {"x": [1, 2, 4, 4]}, "y", {"w": random(2, 3, 3, 3)}, wrap=False)
        for auto in ("SAME_UPPER", "SAME_LOWER"):
            case(f"convtranspose_{auto.lower()}", v, n("ConvTranspose", "x w", "y", strides=[2, 2], auto_pad=auto), {"x": [1, 2, 4, 4]}, "y", {"w": random(2, 3, 3, 3)}, wrap=False)
            case(f"conv_{auto.lower()}", v, n("Conv", "x w", "y", strides=[2, 2], auto_pad=auto), {"x": [1, 2, 5, 4]}, "y", {"w": random(3, 2, 3, 2)})
        case("cast", v, [n("Cast", "x", "t", to=T.INT32), n("Cast", "t", "y", to=F)], {"x": [9]}, "y")
        case("prelu", v, n("PRelu", "x s", "y"), {"x": [2, 3, 4]}, "y", {"s": f32(0.1, 0.2, 0.3).reshape(3, 1)})
        case("depthtospace", v, n("DepthToSpace", "x", "y", blocksize=2), {"x": [1, 8, 2, 3]}, "y")
        case("spacetodepth", v, n("SpaceToDepth", "x", "y", blocksize=2), {"x": [1, 2, 4, 6]}, "y")
        case("max", v, n("Max", "x z", "y"), {"x": [2, 3], "z": [2, 3]}, "y")
        case("compare", v, [n("Greater", "x z", "t"), n("Cast", "t", "y", to=F)], {"x": [2, 3], "z": [3]}, "y")
    for v in (7, 9, 11, 13):
        w = {"w": random(1, 16, 3), "r": random(1, 16, 4), "b": random(1, 32)}
        case("lstm", v, n("LSTM", "x w r b", "y h c", hidden_size=4), {"x": [5, 2, 3]}, "y h c", w)
        w = {"w": random(1, 12, 3), "r": random(1, 12, 4)}
        case("gru", v, n("GRU", "x w r", "y h", hidden_size=4, linear_before_reset=1), {"x": [5, 2, 3]}, "y h", w)
        case("rnn", v, n("RNN", "x w r", "y h", hidden_size=4), {"x": [5, 2, 3]}, "y h", {"w": random(1, 4, 3), "r": random(1, 4, 4)})
    q = {"s": np.float32(0.1), "z": np.uint8(128)}
    for v in (10, 11, 12):
        case("qdq", v, [n("QuantizeLinear", "x s z", "q"), n("DequantizeLinear", "q s z", "y")], {"x": [3, 4]}, "y", q)
    for v in (10, 13):
        case("isinf", v, [n("IsInf", "x", "t"), n("IsNaN", "x", "u"), n("Or", "t u", "w"), n("Cast", "w", "y", to=F)], {"x": [4]}, "y")
        case("mod", v, n("Mod", "x z", "y", fmod=1), {"x": [4], "z": [4]}, "y")
    case("cumsum", 11, n("CumSum", "x a", "y"), {"x": [3, 4]}, "y", {"a": np.array(1)})
    case("pow", 11, n("Pow", "x e", "y"), {"x": [4]}, "y", {"e": f32(2)})
    case("shape", 11, n("Shape", "x", "y"), {"x": [3, 4]}, {"y": (I, None)})


def control_flow():
    info = h.make_tensor_value_info
    for v in (8, 9, 10, 11, 12):
        body = [n("Add", "acc row", "sum"), n("Softmax", "sum", "soft", axis=0 if v < 11 else -2), n("Identity", "cond", "go"), n("ReduceSum", "soft", "total", axes=[0, 1], keepdims=0)]
        body.append(n("Clip", "soft", "next", min=0.1, max=0.4) if v < 11 else n("Squeeze", "lifted", "next", axes=[0]))
        if v >= 11:
            body.insert(4, n("Unsqueeze", "soft", "lifted", axes=[0]))
        g = h.make_graph(body, "body", [info("it", I, []), info("cond", B, []), info("acc", F, [2, 3])], [info("go", B, []), info("next", F, [2, 3]), info("total", F, [])])
        nodes = [n("Split", "x", "row rest", axis=0), n("Loop", "trip ok row", "y t", body=g), n("ReduceMean", "rest", "z", axes=[1])]
        case("loop", v, nodes, {"x": [4, 3]}, "y t z", {"trip": i64(3)[0], "ok": np.array(True)}, keep=v in (9, 11), wrap=False)
        # An If in a Loop: the branches capture the loop variable, and its type follows only from the Loop.
        then = h.make_graph([n("Dropout", "acc", "ta")], "then", [], [info("ta", F, None)])
        other = h.make_graph([n("ReduceSum", "acc", "tb", axes=[1], keepdims=1)], "else", [], [info("tb", F, None)])
        body = [n("Identity", "cond", "go"), n("If", "cond", "branch", then_branch=then, else_branch=other)]
        body += [n("Clip", "branch", "next", max=0.3)] if v < 11 else [n("Identity", "branch", "next")]
        g = h.make_graph(body, "body", [info("it", I, []), info("cond", B, []), info("acc", F, None)], [info("go", B, []), info("next", F, None)])
        case("if_in_loop", v, n("Loop", "trip ok x", "y", body=g), {"x": [2, 3]}, "y", {"trip": i64(2)[0], "ok": np.array(True)}, keep=v == 9, wrap=False)
    for v in (8, 9, 11):
        body = h.make_graph([n("Add", "s a", "s1"), n("ReduceSum", "s1", "o", axes=[0], keepdims=1)], "body", [info("s", F, [3]), info("a", F, [3])], [info("s1", F, [3]), info("o", F, [1])])
        if v == 8:
            case("scan", v, n("Scan", "_ s0 x", "sn y", body=body, num_scan_inputs=1), {"s0": [2, 3], "x": [2, 5, 3]}, "sn y", keep=True, wrap=False)
            case("scan_reverse", v, n("Scan", "_ s0 x", "sn y", body=body, num_scan_inputs=1, directions=[1]), {"s0": [2, 3], "x": [2, 5, 3]}, "sn y", wrap=False)
            capture = h.make_graph([n("Mul", "a k", "t"), n("Add", "s t", "s1"), n("Clip", "s1", "o", min=0.0)], "body", [info("s", F, [3]), info("a", F, [3])], [info("s1", F, [3]), info("o", F, [3])])
            case("scan_capture", v, n("Scan", "_ s0 x", "sn y", body=capture, num_scan_inputs=1), {"s0": [2, 3], "x": [2, 5, 3], "k": [3]}, "sn y", wrap=False)
            case("scan_lengths", v, n("Scan", "l s0 x", "sn y", body=body, num_scan_inputs=1), {"s0": [2, 3], "x": [2, 5, 3]}, "sn y", {"l": i64(5, 3)}, keep=True, wrap=False)
        else:
            case("scan", v, n("Scan", "s0 x", "sn y", body=body, num_scan_inputs=1), {"s0": [3], "x": [5, 3]}, "sn y", wrap=False)


def functions():
    imports = [h.make_opsetid("", 11)]
    f = h.make_function("local", "f", ["a"], ["b"], [n("Unsqueeze", "a", "t", axes=[0]), n("Softmax", "t", "b", axis=1)], imports)
    case("function", 11, h.make_node("f", ["x"], ["y"], name="call", domain="local"), {"x": [2, 3]}, "y", keep=True, functions=[f])
    node = h.make_node("ReduceSum", ["a"], ["b"], name="sum", keepdims=0)
    node.attribute.append(onnx.AttributeProto(name="axes", ref_attr_name="over", type=onnx.AttributeProto.INTS))
    f = h.make_function("local", "f", ["a"], ["b"], [node], imports, attributes=["over"])
    case("function_attribute", 11, h.make_node("f", ["x"], ["y"], name="call", domain="local", over=[1]), {"x": [2, 3]}, "y", keep=True, functions=[f])
    node = h.make_node("LeakyRelu", ["a"], ["b"], name="leaky")
    node.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    f = h.make_function("local", "f", ["a"], ["b"], [node], imports, attributes=["slope"])
    case("function_kept_attribute", 11, h.make_node("f", ["x"], ["y"], name="call", domain="local", slope=0.3), {"x": [2, 3]}, "y", keep=True, functions=[f])
    foreign = h.make_node("MadeUp", ["t"], ["y"], name="made_up")
    case("foreign", 11, [n("Squeeze", "x", "t", axes=[0]), foreign], {"x": [1, 3]}, "y", keep=True, wrap=False)
    case("too_old", 7, n("Relu", "x", "y"), {"x": [1, 3]}, "y", keep=True, wrap=False)
    CASES["too_old_7"][0].opset_import[0].version = 6
    nodes = [n("Conv", "x w b", "t"), n("BatchNormalization", "t s b m v", "u"), n("Clip", "u", "y", min=0.0)]
    weights = {"w": random(2, 1, 1, 1), **{k: f32(1, 2) for k in "bsmv"}}
    case("initializers_as_inputs", 8, nodes, {"x": [1, 1, 2, 2]}, "y", weights, keep=True)


def models(folder, everything):
    for part in (squeeze_reduce_split, softmax, clip, pad_slice_topk, normalization, resize, indexing, pooling_and_rest, control_flow, functions):
        part()
    os.makedirs(folder, exist_ok=True)
    count = 0
    for name, (model, keep, wrap) in CASES.items():
        variants = {name: model} if keep or everything else {}
        if everything and wrap:
            variants[name + "-if"] = in_if(model)
            variants[name + "-function"] = in_function(model)
        for variant, made in variants.items():
            made.producer_name = ""
            onnx.save(made, os.path.join(folder, variant + ".onnx"))
            count += 1
    print(count, "models in", folder)


def sample(model, name, seed):
    rng = np.random.default_rng(seed)
    own = {i.name for i in model.graph.initializer}
    feed = {}
    for i in model.graph.input:
        if i.name in own:
            continue
        t = i.type.tensor_type
        sizes = {"n": 2, "c": 6, "d0": 2, "d1": 3, "d2": 4, "d3": 2}
        shape = [d.dim_value if d.HasField("dim_value") else sizes.get(d.dim_param, 3) for d in t.shape.dim]
        low, high = (-2, 2)
        wanted = RANGES.get((name.split("-")[0], i.name))
        if wanted == "resize":
            feed[i.name] = np.array([1, 1, 2, 3])
            continue
        low, high = wanted or (low, high)
        if t.elem_type == F:
            x = rng.standard_normal(shape) if not wanted else rng.uniform(low, high, shape)
            feed[i.name] = x.astype(np.float32)
        elif t.elem_type == B:
            feed[i.name] = np.array(seed % 2 == 0)
        else:
            feed[i.name] = rng.integers(low, high + (wanted is None), shape).astype(h.tensor_dtype_to_np_dtype(t.elem_type))
    return feed


def rejected(model):
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception:
        return True
    return False


# Case → why its outputs may differ.
TOLERATED = {
    "dropout_mask": "onnxruntime leaves the mask of old versions zero; ONNX says that nothing is dropped",
}


def check(folder, only=""):
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    models(os.path.join(folder, ".again"), False)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = lambda path: ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tally = {}
    bad = 0

    def count(what, detail=""):
        nonlocal bad
        tally[what] = tally.get(what, 0) + 1
        if detail:
            print(f"{what}: {detail}")

    for path in sorted(glob.glob(os.path.join(folder, "*.onnx"))):
        base = os.path.basename(path)[:-5]
        if ".to" in base or not base.startswith(only):
            continue
        results = [p for p in sorted(glob.glob(glob.escape(path[:-5]) + ".to*")) if p.endswith((".onnx", ".err"))]
        try:
            before = session(path)
        except Exception as e:
            before = None
            reason = str(e).splitlines()[0][:150]
        for target in results:
            label = os.path.basename(target)
            if target.endswith(".err"):
                count("refused", f"{label}: {open(target).read().splitlines()[0][:120]}" if "to13" in label or "to21" in label else "")
                continue
            raised = onnx.load(target)
            try:
                onnx.checker.check_model(raised, full_check=True)
            except Exception as e:
                if before is None or rejected(onnx.load(path)):
                    count("original is invalid")
                    continue
                bad += 1
                count("INVALID", f"{label}: {str(e)[:300]}")
                continue
            if before is None:
                count("original does not load", f"{label}: {reason}")
                continue
            try:
                after = session(target)
            except Exception as e:
                ceiling = any(op in str(e) for op in ("RoiAlign", "GlobalLpPool"))
                bad += not ceiling
                count("no kernel above 21" if ceiling else "RAISED DOES NOT LOAD", "" if ceiling else f"{label}: {str(e)[:300]}")
                continue
            verdict = "equal"
            for seed in range(3):
                feed = sample(onnx.load(path), base, seed)
                try:
                    a = before.run(None, feed)
                except Exception as e:
                    verdict = "original does not run"
                    detail = str(e)[:150]
                    break
                b = after.run(None, feed)
                same = lambda p, q: p.shape == q.shape and p.dtype == q.dtype and np.array_equal(p, q, equal_nan=p.dtype.kind == "f")
                if not all(same(p, q) for p, q in zip(a, b)):
                    close = all(p.shape == q.shape and np.allclose(p, q, rtol=1e-6, atol=1e-6, equal_nan=True) for p, q in zip(a, b))
                    verdict = "close" if close else "DIFFERENT"
                    if close:
                        gap = max(np.max(np.abs(p.astype(np.float64) - q)) for p, q in zip(a, b))
                        detail = f"max gap {gap:.3g}"
                    else:
                        detail = f"{[p.shape for p in a]} {[q.shape for q in b]} {a[0].ravel()[:6]} {b[0].ravel()[:6]}"
                    break
            if verdict == "DIFFERENT" and any(base.startswith(k) for k in TOLERATED):
                verdict = "different, tolerated"
            bad += verdict == "DIFFERENT"
            count(verdict, "" if verdict in ("equal", "different, tolerated") else f"{label}: {detail}")
    print(tally)
    return 1 if bad else 0


if __name__ == "__main__":
    if len(sys.argv) >= 3 and sys.argv[1] == "models":
        models(sys.argv[2], "--all" in sys.argv)
    elif len(sys.argv) >= 3 and sys.argv[1] == "check":
        sys.exit(check(*sys.argv[2:4]))
    else:
        sys.exit(__doc__)
