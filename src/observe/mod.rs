//! Everything that runs samples through models.

pub mod calibrate;
pub mod compare;
mod memory;
mod pool;
pub mod prove;
pub mod run;
mod segmented;
pub mod sensitivity;
pub mod sites;

pub use memory::{Estimate, Memory, fits_twice};
pub use pool::{Progress, Silent};
