//! What passes share.

pub mod change;
pub(crate) mod channels;
pub(crate) mod divide;
pub mod evaluate;
pub(crate) mod float_ops;
pub(crate) mod granularity;
pub(crate) mod graphs;
pub(crate) mod insert_blocks;
pub(crate) mod nodes;
pub mod operands;
pub(crate) mod qoperator;
pub(crate) mod raise;
pub(crate) mod retype;
