//! ONNX's textual syntax: printed and parsed.
