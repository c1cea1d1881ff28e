//! Walks over the graphs of a model: which there are, what reads what, and in which order.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use petgraph::algo::{astar, kosaraju_scc};
use petgraph::graph::{DiGraph, NodeIndex};

use super::{GraphId, Model, NodeId, Owner, User, ValueId};

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

    /// The nodes of the main graph and its bodies, in the order of [`all_graphs`](Self::all_graphs); those of functions, which
    /// import opsets of their own, are left out.
    #[must_use]
    pub fn nodes_outside_functions(&self) -> Vec<NodeId> {
        let graphs = self.all_graphs().into_iter().filter(|&g| !self.in_function(g));
        graphs.flat_map(|g| self.graph(g).nodes().to_vec()).collect()
    }

    /// Whether a graph is a function, or a body inside one.
    fn in_function(&self, mut graph: GraphId) -> bool {
        loop {
            match self.graph(graph).owner {
                Owner::Function(..) => return true,
                Owner::Main => return false,
                Owner::Node(node) => match self.node(node).graph {
                    Some(outer) => graph = outer,
                    None => return false,
                },
            }
        }
    }

    /// The graph that a value belongs to.
    #[must_use]
    pub fn home(&self, value: ValueId) -> Option<GraphId> {
        if let Some(node) = self.producer(value) {
            return self.node(node).graph;
        }
        let defines = |&g: &GraphId| {
            let graph = self.graph(g);
            graph.initializers.contains(&value) || graph.inputs().any(|v| v == value)
        };
        self.all_graphs().into_iter().find(defines)
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
    fn consumers_in(&self, graph: GraphId, node: NodeId) -> Vec<NodeId> {
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

    /// The nodes of one graph in the order of the file, with an edge from each producer to each of its consumers in the
    /// same graph; uses inside a consumer's bodies are uses by it.
    fn edges(&self, graph: GraphId) -> DiGraph<NodeId, ()> {
        let nodes = self.graph(graph).nodes();
        let mut edges = DiGraph::with_capacity(nodes.len(), nodes.len());
        let index: HashMap<NodeId, NodeIndex> = nodes.iter().map(|&node| (node, edges.add_node(node))).collect();
        for node in nodes {
            for consumer in self.consumers_in(graph, *node) {
                edges.add_edge(index[node], index[&consumer], ());
            }
        }
        edges
    }

    /// The nodes of a graph with producers before consumers, otherwise in the order of the file; `Err` holds the
    /// nodes of one cycle, each before its consumer.
    ///
    /// # Errors
    /// The graph has a cycle.
    pub fn topological_order(&self, graph: GraphId) -> Result<Vec<NodeId>, Vec<NodeId>> {
        let edges = self.edges(graph);
        // petgraph's own order is none of the file's.
        let mut waiting = vec![0usize; edges.node_count()];
        for edge in edges.raw_edges() {
            waiting[edge.target().index()] += 1;
        }
        let mut ready: BinaryHeap<_> = edges.externals(petgraph::Incoming).map(Reverse).collect();
        let mut order = Vec::with_capacity(edges.node_count());
        while let Some(Reverse(at)) = ready.pop() {
            order.push(edges[at]);
            for next in edges.neighbors(at) {
                waiting[next.index()] -= 1;
                if waiting[next.index()] == 0 {
                    ready.push(Reverse(next));
                }
            }
        }
        if order.len() == edges.node_count() { Ok(order) } else { Err(cycle(&edges)) }
    }
}

/// The shortest cycle through the first node of the file that is on one, each node before its consumer; empty where there
/// is none.
fn cycle(edges: &DiGraph<NodeId, ()>) -> Vec<NodeId> {
    // Not Tarjan's, which is recursive: the length of a chain is up to the file.
    let components = kosaraju_scc(edges);
    let cyclic = components.iter().filter(|c| c.len() > 1 || edges.contains_edge(c[0], c[0]));
    let Some((start, component)) = cyclic.filter_map(|c| Some((*c.iter().min()?, c))).min() else { return Vec::new() };
    let inside: HashSet<NodeIndex> = component.iter().copied().collect();
    let back = |next: NodeIndex| astar(edges, next, |at| at == start, |_| 1, |_| 0);
    let paths = edges.neighbors(start).filter(|next| inside.contains(next)).filter_map(back);
    let Some((_, mut path)) = paths.min_by_key(|(length, _)| *length) else { return Vec::new() };
    path.rotate_right(1);
    path.into_iter().map(|at| edges[at]).collect()
}
