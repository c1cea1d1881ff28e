//! Outputs of language models: rows of logits, one for each token of an input and each word of the table that it is looked up in.

use std::collections::BTreeMap;

use crate::ir::{Model, Tensor, ValueId};
use crate::numerics::logits::Logits;
use crate::onnx::DataType;
use crate::samples::Sample;

/// Smaller tables hold kinds of tokens, and classes.
const LEAST_WORDS: usize = 32;

/// Where the tokens of an output come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Vocabulary {
    /// The input of tokens.
    tokens: String,
    /// How many there are to choose from.
    words: usize,
}

/// The inputs of tokens, each with the size of its table.
fn tables(model: &Model) -> Vec<Vocabulary> {
    let graph = model.graph(model.main());
    let mut found = Vec::new();
    for &node in graph.nodes() {
        let at = model.node(node);
        let lookup = match at.op_type() {
            "Gather" | "GatherBlockQuantized" => at.input(0).zip(at.input(1)),
            "EmbedLayerNormalization" => at.input(2).zip(at.input(0)),
            _ => None,
        };
        let Some((table, indices)) = lookup else { continue };
        let words = model.shape(table).and_then(|shape| *shape.first()?).filter(|&words| words >= LEAST_WORDS);
        let tokens = origin(model, indices).filter(|&v| graph.inputs().any(|input| input == v));
        let integers = |v: &ValueId| model.dtype(*v).is_some_and(|dtype| !dtype.is_float());
        if let (Some(words), Some(tokens)) = (words, tokens.filter(integers)) {
            found.push(Vocabulary { tokens: model.value(tokens).name().to_owned(), words });
        }
    }
    found
}

/// What a value is before casts.
fn origin(model: &Model, mut value: ValueId) -> Option<ValueId> {
    while let Some(node) = model.producer(value).filter(|&node| model.node(node).is("Cast")) {
        value = model.node(node).input(0)?;
    }
    Some(value)
}

/// The outputs of a model that may be logits; which are, their shapes tell when it has run.
pub(super) fn vocabularies(model: &Model) -> BTreeMap<String, Vec<Vocabulary>> {
    let tables = tables(model);
    if tables.is_empty() {
        return BTreeMap::new();
    }
    let graph = model.graph(model.main());
    let float = |v: &ValueId| model.dtype(*v).is_none_or(DataType::is_float);
    graph.outputs().filter(float).map(|v| (model.value(v).name().to_owned(), tables.clone())).collect()
}

/// How far two outputs are apart as logits `[…, tokens, words]`, if they are: their last axis is the size of a vocabulary.
///
/// Tokens that an input named `attention_mask` leaves out do not count.
pub(super) fn logits(of: &[Vocabulary], sample: &Sample, dims: &[usize], x: &[f32], y: &[f32]) -> Option<Logits> {
    let (&words, before) = dims.split_last()?;
    let vocabulary = of.iter().find(|v| v.words == words).filter(|_| !before.is_empty())?;
    let same = |tensor: &&Tensor| tensor.dims() == before;
    let listed = |name: &str| sample.get(name).filter(same).and_then(Tensor::to_i64);
    let (tokens, mask) = (listed(&vocabulary.tokens), listed("attention_mask"));
    let length = before.last().copied().unwrap_or(1).max(1);
    let seen = |at: usize| mask.as_ref().is_none_or(|mask| mask.get(at).is_none_or(|&m| m != 0));
    let mut found = Logits::default();
    for (at, (x, y)) in x.chunks(words.max(1)).zip(y.chunks(words.max(1))).enumerate().filter(|(at, _)| seen(*at)) {
        let next = Some(at + 1).filter(|next| next % length != 0 && seen(*next));
        let next = next.and_then(|next| usize::try_from(*tokens.as_ref()?.get(next)?).ok());
        found.feed(x, y, next);
    }
    Some(found)
}
