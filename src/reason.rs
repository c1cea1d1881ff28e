//! Why something is as it is: what plans, passes and reports say of a node or tensor, as data.
//!
//! Each variant has typed fields, a sentence for people ([`Display`](std::fmt::Display), a clause in lower case without a
//! full stop), and in documents the shape `{"code": …, fields…, "text": …}`: programs read the code and the fields, people
//! the text, which is ignored when a document is read back.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::onnx::DataType;

/// One table: the variant with its fields, and what people read.
macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident $({ $($field:ident: $type:ty),* $(,)? })? => $text:literal,)*) => {
        /// Why something is as it is.
        #[allow(missing_docs, reason = "the sentence of each variant says what its fields are")]
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "code", rename_all = "kebab-case", remote = "Self")]
        pub enum Reason {
            $($(#[$doc])* $name $({ $($field: $type),* })?,)*
        }

        impl std::fmt::Display for Reason {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self {
                    $(Self::$name $({ $($field),* })? => write!(f, $text),)*
                }
            }
        }
    };
}

reasons! {
    /// A rule of the configuration switches one site off.
    OffBy { what: String, rule: String } => "its {what} is switched off by {rule}",
    /// An operand would have to be known before the model runs.
    NotConstant { what: String } => "its {what} is not constant",
    /// An operand has an element type that cannot be used here.
    WrongType { what: String, found: DataType, wanted: String } => "its {what} is {found}, not {wanted}",
    /// It is quantized in the input model.
    QuantizedAlready => "is quantized already; its quantizers are kept",
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        struct Data<'a>(&'a Reason);
        impl Serialize for Data<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                Reason::serialize(self.0, serializer)
            }
        }
        #[derive(Serialize)]
        struct Document<'a> {
            #[serde(flatten)]
            data: Data<'a>,
            text: String,
        }
        Document { data: Data(self), text: self.to_string() }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Reason {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Reason::deserialize(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_have_code_fields_and_text() {
        let reasons = [
            (
                Reason::QuantizedAlready,
                r#"{"code":"quantized-already","text":"is quantized already; its quantizers are kept"}"#,
            ),
            (
                Reason::OffBy { what: "input".into(), rule: "exclude \"a\"".into() },
                r#"{"code":"off-by","what":"input","rule":"exclude \"a\"","text":"its input is switched off by exclude \"a\""}"#,
            ),
        ];
        for (reason, document) in reasons {
            assert_eq!(serde_json::to_string(&reason).ok().as_deref(), Some(document));
            assert_eq!(serde_json::from_str::<Reason>(document).ok(), Some(reason));
        }
    }
}
