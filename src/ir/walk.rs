//! Orders and scopes: petgraph's algorithms over the arenas, without a second copy of the graph.

use std::collections::{BinaryHeap, HashMap};

use petgraph::visit::{GraphBase, GraphRef, IntoNeighbors, IntoNodeIdentifiers, NodeIndexable};

use super::{GraphId, Model, NodeId, Owner, User};

/// The nodes of one graph, as petgraph sees them: an edge runs from a producer to each consumer in the same graph,
/// uses inside a consumer's bodies included.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    model: &'a Model,
    graph: GraphId,
}

impl<'a> Scope<'a> {
    /// The scope of one graph.
    #[must_use]
    pub fn new(model: &'a Model, graph: GraphId) -> Self {
        Self { model, graph }
    }
}

impl GraphBase for Scope<'_> {
    type NodeId = NodeId;
    type EdgeId = (NodeId, NodeId);
}

impl GraphRef for Scope<'_> {}

impl<'a> IntoNodeIdentifiers for Scope<'a> {
    type NodeIdentifiers = std::iter::Copied<std::slice::Iter<'a, NodeId>>;
    fn node_identifiers(self) -> Self::NodeIdentifiers {
        self.model.graph(self.graph).nodes().iter().copied()
    }
}

impl IntoNeighbors for Scope<'_> {
    type Neighbors = std::vec::IntoIter<NodeId>;
    fn neighbors(self, node: NodeId) -> Self::Neighbors {
        self.model.consumers_in(self.graph, node).into_iter()
    }
}

impl NodeIndexable for Scope<'_> {
    fn node_bound(&self) -> usize {
        self.model.nodes.len()
    }
    fn to_index(&self, node: NodeId) -> usize {
        node.0 as usize
    }
    fn from_index(&self, index: usize) -> NodeId {
        NodeId(index as u32)
    }
}

impl Model {
    /// Every graph that is still part of the model: the main one first, each body after its node's graph, functions
    /// last.
    #[must_use]
    pub fn all_graphs(&self) -> Vec<GraphId> {
        let mut found = Vec::new();
        let mut queue = vec![self.main];
        queue.extend(self.functions.iter().map(|f| f.graph));
        queue.reverse();
        while let Some(graph) = queue.pop() {
            found.push(graph);
            let bodies: Vec<_> = self.graph(graph).nodes().iter().flat_map(|&n| self.node(n).bodies()).collect();
            queue.extend(bodies.into_iter().rev());
        }
        found
    }

    /// The ancestor of `node` (itself included) that is in `graph`, if any.
    #[must_use]
    pub fn ancestor_in(&self, graph: GraphId, node: NodeId) -> Option<NodeId> {
        let mut node = node;
        loop {
            let at = self.node(node).graph?;
            if at == graph {
                return Some(node);
            }
            match self.graph(at).owner {
                Owner::Node(owner) => node = owner,
                Owner::Main | Owner::Function(_) => return None,
            }
        }
    }

    /// Nodes of `graph` that use an output of `node`, directly or in a body; each once, in arena order.
    #[must_use]
    pub fn consumers_in(&self, graph: GraphId, node: NodeId) -> Vec<NodeId> {
        let mut found: Vec<NodeId> = self
            .node(node)
            .outputs
            .iter()
            .flatten()
            .flat_map(|&v| self.value(v).users())
            .filter_map(|&user| match user {
                User::Node { node, .. } => self.ancestor_in(graph, node),
                User::Output { graph: body, .. } => match self.graph(body).owner {
                    Owner::Node(owner) if body != graph => self.ancestor_in(graph, owner),
                    _ => None,
                },
            })
            .collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// The nodes of a graph with producers before consumers, otherwise in the order of the file; `Err` holds the
    /// nodes of one cycle, each before its consumer.
    ///
    /// # Errors
    /// The graph has a cycle.
    pub fn topological_order(&self, graph: GraphId) -> Result<Vec<NodeId>, Vec<NodeId>> {
        let nodes = self.graph(graph).nodes();
        let position: HashMap<NodeId, usize> = nodes.iter().enumerate().map(|(i, &n)| (n, i)).collect();
        let mut waiting = vec![0usize; nodes.len()];
        let mut next: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
        for (at, &node) in nodes.iter().enumerate() {
            for consumer in self.consumers_in(graph, node) {
                let to = position[&consumer];
                next[at].push(to);
                waiting[to] += 1;
            }
        }
        let ready = waiting.iter().enumerate().filter(|(_, w)| **w == 0).map(|(i, _)| std::cmp::Reverse(i));
        let mut heap: BinaryHeap<_> = ready.collect();
        let mut order = Vec::with_capacity(nodes.len());
        while let Some(std::cmp::Reverse(at)) = heap.pop() {
            order.push(nodes[at]);
            for &to in &next[at] {
                waiting[to] -= 1;
                if waiting[to] == 0 {
                    heap.push(std::cmp::Reverse(to));
                }
            }
        }
        if order.len() == nodes.len() {
            return Ok(order);
        }
        // What still waits is on a cycle or behind one: against the edges, among what waits, each path ends in a cycle.
        // (petgraph's search for cycles is recursive, and the length of a chain is up to the file.)
        let mut before = vec![None; nodes.len()];
        for at in (0..nodes.len()).filter(|&at| waiting[at] > 0) {
            for &to in &next[at] {
                before[to].get_or_insert(at);
            }
        }
        let mut at = waiting.iter().position(|&w| w > 0);
        let mut step_of = vec![usize::MAX; nodes.len()];
        let mut path = Vec::new();
        while let Some(here) = at.filter(|&here| step_of[here] == usize::MAX) {
            step_of[here] = path.len();
            path.push(nodes[here]);
            at = before[here];
        }
        let mut cycle = at.map_or(Vec::new(), |start| path.split_off(step_of[start]));
        cycle.reverse();
        if let Some(first) = cycle.iter().enumerate().min_by_key(|(_, n)| **n).map(|(at, _)| at) {
            cycle.rotate_left(first);
        }
        Err(cycle)
    }
}
