//! Everything that runs samples through models.

pub mod blocks;
pub mod calibrate;
pub mod compare;
pub mod gather;
pub mod matrices;
mod memory;
mod pool;
pub mod prove;
pub mod rows;
pub mod run;
mod segmented;
pub mod sensitivity;
pub mod sites;
mod stream;
pub mod verify;
mod vocabulary;

pub use memory::{Estimate, Memory, fits_twice};
pub use pool::{Progress, Silent};
pub use run::Run;
