//! Graphs, what they return, and what old ones do not allow.

use crate::ir::{GraphId, Model, User, ValueId};
use crate::passes::{Change, Outcome};

/// Whether some graph returns `value`.
pub(crate) fn is_graph_output(model: &Model, value: ValueId) -> bool {
    model.value(value).users().iter().any(|user| matches!(user, User::Output { .. }))
}

/// The main graph and the bodies below it, parents first.
pub(crate) fn graphs_outside_functions(model: &Model) -> Vec<GraphId> {
    let mut found = vec![model.main()];
    let mut at = 0;
    while at < found.len() {
        found.extend(model.graph(found[at]).nodes().iter().flat_map(|&n| model.node(n).bodies()));
        at += 1;
    }
    found
}

/// Before IR version 4 every initializer had to be a graph input as well; a pass that adds plain ones asks for this.
pub(crate) fn allow_plain_initializers(model: &mut Model, outcome: &mut Outcome) {
    let version = model.ir_version();
    if version < 4 {
        model.set_ir_version(4);
        outcome.changed("model", Change::IrVersion { from: version, to: 4 });
    }
}
