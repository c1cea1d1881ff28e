"""What ModelOpt and Quark make of the fixtures, quantizer by quantizer: their documented rules, applied to module names.

Run in this folder; writes expected.json. Sites are named as exporters name the nodes of such modules.
"""
import json
from fnmatch import fnmatchcase

MODULES = {
    "conv1": ("Conv2d", "Conv"),
    "conv1_bn": ("BatchNorm2d", None),
    "model.layers.0.self_attn.q_proj": ("Linear", "MatMul"),
    "model.layers.0.self_attn.k_proj": ("Linear", "MatMul"),
    "model.layers.0.mlp.fc1": ("Linear", "Gemm"),
    "model.layers.1.self_attn.v_proj": ("Linear", "MatMul"),
    "model.layers.1.mlp.fc1": ("Linear", "MatMul"),
    "model.layers.1.mlp.fc2": ("Linear", "MatMul"),
    "model.layers.1.mlp.gate": ("Linear", "MatMul"),
    "model.layers.10.mlp.fc2": ("Linear", "Gemm"),
    "model.layers.10.mlp.gate_proj": ("Linear", "Gemm"),
    "output.dense": ("Linear", "MatMul"),
    "lm_head": ("Linear", "MatMul"),
}
KINDS = ["input", "weight", "output"]
FLOATS = {"e4m3": "float8e4m3fn"}


def node(module, op):
    """`model.layers.0.mlp.fc1` -> `/model/layers.0/mlp/fc1/MatMul`, with the dot before an index kept."""
    parts = []
    for part in module.split("."):
        if part.isdigit():
            parts[-1] += "." + part
        else:
            parts.append(part)
    return "/" + "/".join(parts) + "/" + op


def modelopt(document):
    cfg = document["quant_cfg"] if isinstance(document, dict) else document
    if isinstance(cfg, dict):
        entries = []
        # The base of everything else while this form was current.
        for key, value in sorted(cfg.items(), key=lambda item: item[0] != "default"):
            key = "*" if key == "default" else key
            inner = value.items() if key.startswith("nn.") else [(key, value)]
            for name, fields in inner:
                fields = dict(fields)
                entry = {"quantizer_name": name}
                if key.startswith("nn."):
                    entry["parent_class"] = key
                if "enable" in fields:
                    entry["enable"] = fields.pop("enable")
                if fields:
                    entry["cfg"] = fields
                entries.append(entry)
        cfg = entries
    found = {}
    for module, (cls, op) in MODULES.items():
        for kind in KINDS:
            state = {"enable": kind != "output", "num_bits": 8, "axis": 0 if kind == "weight" else None}
            for entry in cfg:
                if not fnmatchcase(f"{module}.{kind}_quantizer", entry["quantizer_name"]):
                    continue
                if entry.get("parent_class", "nn." + cls) != "nn." + cls:
                    continue
                if "cfg" in entry:
                    state = {"enable": True, "num_bits": 8, "axis": None} | entry["cfg"]
                if "cfg" in entry or "enable" in entry:
                    state["enable"] = entry.get("enable", True)
            if op is None:
                continue
            site = f"{node(module, op)}.{kind}"
            # Groups are for linear layers only; this one difference is meant, and said in the result.
            if not state["enable"] or ("block_sizes" in state and op == "Conv"):
                found[site] = [op, None]
                continue
            bits = state["num_bits"]
            spec = {"dtype": FLOATS.get(bits, f"int{bits}")}
            if "block_sizes" in state:
                spec |= {"granularity": "per-group", "group_size": state["block_sizes"]["-1"]}
            else:
                spec["granularity"] = "per-tensor" if state["axis"] is None else "per-channel"
            if kind != "weight":
                spec["dynamic"] = state.get("type") == "dynamic"
            if state.get("calibrator") == "histogram":
                spec["observer"] = "entropy"
            found[site] = [op, spec]
    return found


def quark(document):
    document = document.get("quantization_config", document)
    found = {}
    for module, (cls, op) in MODULES.items():
        if op is None:
            continue
        levels = [document["global_quant_config"]]
        if cls in document["layer_type_quant_config"]:
            levels.append(document["layer_type_quant_config"][cls])
        layers = document["layer_quant_config"]
        if module in layers:
            levels.append(layers[module])
        else:
            levels += [config for name, config in layers.items() if fnmatchcase(module, name)][:1]
        for kind, key in [("input", "input_tensors"), ("weight", "weight"), ("output", "output_tensors")]:
            spec = None
            for level in levels:
                spec = level[key] or spec
            site = f"{node(module, op)}.{kind}"
            if spec is None or any(fnmatchcase(module, name) for name in document["exclude"]):
                found[site] = [op, None]
                continue
            scale = spec["scale_type"]
            made = {"dtype": {"fp8_e4m3": "float8e4m3fn"}.get(spec["dtype"], spec["dtype"])}
            made["granularity"] = spec["qscheme"].replace("_", "-")
            if made["granularity"] == "per-group" and spec["group_size"] == -1:
                made["granularity"] = "per-channel"
            elif made["granularity"] == "per-group":
                made["group_size"] = spec["group_size"]
            if kind == "input":
                made["dynamic"] = spec["is_dynamic"]
                if spec["is_dynamic"] and made["granularity"] == "per-channel":
                    made["granularity"] = "per-token"
            if spec["dtype"] != "fp8_e4m3":
                made["symmetric"] = spec["symmetric"]
            if scale is not None:
                made["scale_type"] = "power-of-two" if scale == "pof2" else "float"
            if scale == "bfloat16":
                made["scale_dtype"] = "bfloat16"
            for name, observer in [("Percentile", "percentile"), ("MSE", "mse")]:
                if name in spec["observer_cls"]:
                    made["observer"] = observer
            found[site] = [op, made]
    return found


FIXTURES = {
    "modelopt_int8_default": modelopt,
    "modelopt_int4_awq_dict": modelopt,
    "modelopt_replace": modelopt,
    "quark_w8a8": quark,
    "quark_uint4_awq_checkpoint": quark,
}
result = {}
for name, reference in FIXTURES.items():
    with open(name + ".json") as file:
        result[name] = reference(json.load(file))
with open("expected.json", "w") as file:
    lines = []
    for name, sites in result.items():
        rows = ",\n".join(f"  {json.dumps(site)}: {json.dumps(value)}" for site, value in sites.items())
        lines.append(f"{json.dumps(name)}: {{\n{rows}\n}}")
    file.write("{\n" + ",\n".join(lines) + "\n}\n")
