//! What passes share.

pub(crate) mod arithmetic;
pub mod change;
pub(crate) mod channels;
pub mod exact;
pub(crate) mod float_ops;
pub(crate) mod granularity;
pub(crate) mod graphs;
pub(crate) mod insert_blocks;
pub(crate) mod nodes;
pub mod operands;
pub(crate) mod qoperator;
pub(crate) mod raise;
