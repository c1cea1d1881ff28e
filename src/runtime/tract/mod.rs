//! tract as runtime: models are taken apart, expressed in operators that tract has, compiled and run.

mod branches;
mod constant;
mod engine;
mod functions;
mod kernel;
mod program;
mod quantized;
mod rephrase;
mod sequences;
mod session;
mod support;
mod widen;

pub use engine::TractEvaluate;
pub(super) use session::Session;
