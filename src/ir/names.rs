//! The names of tensors. Bodies beside each other may use the same ones; in the main graph a name is one tensor's.

use std::collections::HashMap;

use super::ValueId;

/// The live tensors that bear each name, and which of them the main graph defines.
#[derive(Clone, Debug, Default)]
pub(super) struct Names(HashMap<String, Bearers>);

#[derive(Clone, Debug, Default)]
struct Bearers {
    all: Vec<ValueId>,
    in_main: Option<ValueId>,
}

impl Names {
    pub(super) fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub(super) fn count(&self, name: &str) -> usize {
        self.0.get(name).map_or(0, |b| b.all.len())
    }

    pub(super) fn in_main(&self, name: &str) -> Option<ValueId> {
        self.0.get(name)?.in_main
    }

    /// That of the main graph, or the only one.
    pub(super) fn meant(&self, name: &str) -> Option<ValueId> {
        let bearers = self.0.get(name)?;
        let only = || bearers.all.first().copied().filter(|_| bearers.all.len() == 1);
        bearers.in_main.or_else(only)
    }

    pub(super) fn count_in_main(&self) -> usize {
        self.0.values().filter(|b| b.in_main.is_some()).count()
    }

    /// One more tensor bears `name`.
    pub(super) fn insert(&mut self, name: String, value: ValueId, in_main: bool) {
        let bearers = self.0.entry(name).or_default();
        bearers.all.push(value);
        if in_main {
            bearers.in_main = Some(value);
        }
    }

    /// `value` no longer bears `name`.
    pub(super) fn remove(&mut self, name: &str, value: ValueId) {
        let Some(bearers) = self.0.get_mut(name) else { return };
        bearers.all.retain(|&other| other != value);
        if bearers.all.is_empty() {
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
