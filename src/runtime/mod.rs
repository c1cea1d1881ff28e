//! Running a model and watching its tensors.
