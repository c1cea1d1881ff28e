//! The names of tensors. Bodies beside each other may use the same ones, so a name has a count; in the main graph it is one
//! tensor's.

use std::collections::HashMap;

use super::ValueId;

/// How many live tensors bear each name, and which of them the main graph defines.
#[derive(Clone, Debug, Default)]
pub(super) struct Names(HashMap<String, Bearers>);

#[derive(Clone, Debug, Default)]
struct Bearers {
    count: usize,
    in_main: Option<ValueId>,
}

impl Names {
    pub(super) fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub(super) fn count(&self, name: &str) -> usize {
        self.0.get(name).map_or(0, |b| b.count)
    }

    pub(super) fn in_main(&self, name: &str) -> Option<ValueId> {
        self.0.get(name)?.in_main
    }

    pub(super) fn count_in_main(&self) -> usize {
        self.0.values().filter(|b| b.in_main.is_some()).count()
    }

    /// One more tensor bears `name`.
    pub(super) fn insert(&mut self, name: String, value: ValueId, in_main: bool) {
        let bearers = self.0.entry(name).or_default();
        bearers.count += 1;
        if in_main {
            bearers.in_main = Some(value);
        }
    }

    /// `value` no longer bears `name`.
    pub(super) fn remove(&mut self, name: &str, value: ValueId) {
        let Some(bearers) = self.0.get_mut(name) else { return };
        bearers.count -= 1;
        if bearers.count == 0 {
            self.0.remove(name);
        } else if bearers.in_main == Some(value) {
            bearers.in_main = None;
        }
    }

    /// `value`, which bears `name`, has moved into the main graph.
    pub(super) fn enter_main(&mut self, name: &str, value: ValueId) {
        if let Some(bearers) = self.0.get_mut(name) {
            bearers.in_main = Some(value);
        }
    }
}
