//! Choices of numbers: functions of statistics and matrices that know no graph.

pub mod observers;
pub mod sufficiency;
