//! JSON whose keys stay in order, with the place of each value.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::document::Lines;
use crate::error::{Error, Kind, Result};
use crate::nearest::nearest;

/// A JSON value. The order of keys counts in the documents that are imported.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Table(Vec<(String, Json)>),
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Json;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON value")
            }

            fn visit_unit<E>(self) -> Result<Json, E> {
                Ok(Json::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
                Ok(Json::Bool(value))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
                Ok(Json::Number(value as f64))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
                Ok(Json::Number(value as f64))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
                Ok(Json::Number(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<Json, E> {
                Ok(Json::Text(value.to_owned()))
            }

            fn visit_seq<S: SeqAccess<'de>>(self, mut list: S) -> Result<Json, S::Error> {
                let mut items = Vec::new();
                while let Some(item) = list.next_element()? {
                    items.push(item);
                }
                Ok(Json::List(items))
            }

            fn visit_map<M: MapAccess<'de>>(self, mut table: M) -> Result<Json, M::Error> {
                let mut entries: Vec<(String, Json)> = Vec::new();
                while let Some((key, value)) = table.next_entry::<String, Json>()? {
                    if entries.iter().any(|(k, _)| *k == key) {
                        return Err(de::Error::custom(format!("the key \"{key}\" appears twice")));
                    }
                    entries.push((key, value));
                }
                Ok(Json::Table(entries))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// A value and its place.
#[derive(Clone, Debug)]
pub(super) struct At<'a> {
    pub(super) json: &'a Json,
    path: String,
    lines: &'a Lines,
}

impl<'a> At<'a> {
    pub(super) fn root(json: &'a Json, lines: &'a Lines) -> Self {
        Self { json, path: String::new(), lines }
    }

    /// The path of keys, for people; items of a list at the root are entries.
    pub(super) fn path(&self) -> String {
        let entry = if self.path.starts_with(|c: char| c.is_ascii_digit()) { "entry " } else { "" };
        format!("{entry}{}", self.path)
    }

    fn below(&self, key: &str, json: &'a Json) -> Self {
        let path = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        Self { json, path, lines: self.lines }
    }

    /// An error about this value.
    pub(super) fn wrong(&self, message: impl AsRef<str>) -> Error {
        let message = match self.path().as_str() {
            "" => message.as_ref().to_owned(),
            path => format!("{path}: {}", message.as_ref()),
        };
        let error = Error::new(Kind::Config, message);
        match self.lines.of(&self.path) {
            Some(line) => error.at_line(line),
            None => error,
        }
    }

    /// The value of a key; `null` counts as missing.
    pub(super) fn get(&self, key: &str) -> Option<Self> {
        let Json::Table(entries) = self.json else { return None };
        let (key, value) = entries.iter().find(|(k, value)| k == key && *value != Json::Null)?;
        Some(self.below(key, value))
    }

    /// Whether a key exists, even as `null`.
    pub(super) fn has(&self, key: &str) -> bool {
        matches!(self.json, Json::Table(entries) if entries.iter().any(|(k, _)| k == key))
    }

    pub(super) fn entries(&self) -> Result<Vec<(&'a str, Self)>> {
        match self.json {
            Json::Table(entries) => Ok(entries.iter().map(|(k, v)| (k.as_str(), self.below(k, v))).collect()),
            _ => Err(self.wrong("expected a table")),
        }
    }

    pub(super) fn items(&self) -> Result<Vec<Self>> {
        match self.json {
            Json::List(items) => Ok(items.iter().enumerate().map(|(i, v)| self.below(&i.to_string(), v)).collect()),
            _ => Err(self.wrong("expected a list")),
        }
    }

    pub(super) fn text(&self) -> Result<&'a str> {
        match self.json {
            Json::Text(text) => Ok(text),
            _ => Err(self.wrong("expected a string")),
        }
    }

    pub(super) fn bool(&self) -> Result<bool> {
        match self.json {
            Json::Bool(value) => Ok(*value),
            _ => Err(self.wrong("expected true or false")),
        }
    }

    pub(super) fn number(&self) -> Result<f64> {
        match self.json {
            Json::Number(value) => Ok(*value),
            _ => Err(self.wrong("expected a number")),
        }
    }

    pub(super) fn integer(&self) -> Result<i64> {
        let value = self.number()?;
        if value.fract() == 0.0 && value.abs() < 1e15 {
            return Ok(value as i64);
        }
        Err(self.wrong("expected a whole number"))
    }

    /// One of several words.
    pub(super) fn word<T: Copy>(&self, words: &[(&str, T)]) -> Result<T> {
        let word = self.text()?;
        if let Some((_, meaning)) = words.iter().find(|(w, _)| *w == word) {
            return Ok(*meaning);
        }
        let list: Vec<&str> = words.iter().map(|(w, _)| *w).collect();
        let error = self.wrong(format!("\"{word}\" has no counterpart; {} have one", list.join(", ")));
        Err(match nearest(word, list) {
            Some(near) => error.with_hint(format!("did you mean \"{near}\"?")),
            None => error,
        })
    }

    /// Refuses keys other than these.
    pub(super) fn only(&self, known: &[&str]) -> Result<()> {
        for (key, at) in self.entries()? {
            if !known.contains(&key) {
                let error = at.wrong("unknown key");
                return Err(match nearest(key, known.iter().copied()) {
                    Some(near) => error.with_hint(format!("did you mean \"{near}\"?")),
                    None => error.with_hint(format!("known keys are {}", known.join(", "))),
                });
            }
        }
        Ok(())
    }
}
