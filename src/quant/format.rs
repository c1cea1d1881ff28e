//! Number formats: of elements, of blocks, and of scales.

use std::fmt;

#[cfg(feature = "schema")]
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use crate::onnx::DataType;

/// Declares every format once: its name, and what it consists of. Elements are named as in [`DataType`].
macro_rules! formats {
    (
        elements { $($(#[doc = $doc:literal])* $element:ident $word:literal: $kind:ident $bits:literal,)* }
        blocks { $($(#[doc = $block_doc:literal])* $block:ident $block_word:literal: $size:literal $of:ident $scale:ident,)* }
    ) => {
        /// A number format of the elements of a quantized tensor, named as in ONNX, in lower case.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Format {
            $($(#[doc = $doc])* #[serde(rename = $word)] $element,)*
        }

        impl Format {
            /// Every format, in declaration order.
            pub const ALL: [Self; [$($word),*].len()] = [$(Self::$element),*];

            /// The ONNX type name in lower case: `int8`, `float8e4m3fn`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$element => $word,)*
                }
            }

            /// Bits of one element when packed: 2, 4, 6, 8, 16 or 32.
            pub fn bits(self) -> usize {
                match self {
                    $(Self::$element => $bits,)*
                }
            }

            fn kind(self) -> Kind {
                match self {
                    $(Self::$element => Kind::$kind,)*
                }
            }
        }

        impl From<Format> for DataType {
            /// The ONNX element type that stores a format.
            fn from(format: Format) -> Self {
                match format {
                    $(Format::$element => Self::$element,)*
                }
            }
        }

        impl DataType {
            /// The format stored in this type, if it is one that quantizers produce.
            #[must_use]
            pub fn format(self) -> Option<Format> {
                match self {
                    $(Self::$element => Some(Format::$element),)*
                    _ => None,
                }
            }
        }

        /// A format of blocks: elements of which so many share a scale of 8 bits.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Block {
            $($(#[doc = $block_doc])* $block,)*
        }

        impl Block {
            /// Every format, in declaration order.
            pub const ALL: [Self; [$($block_word),*].len()] = [$(Self::$block),*];

            /// As it is written: `mxfp4`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$block => $block_word,)*
                }
            }

            /// The format of the elements.
            pub fn format(self) -> Format {
                match self {
                    $(Self::$block => Format::$of,)*
                }
            }

            /// Elements with one scale.
            pub fn size(self) -> u32 {
                match self {
                    $(Self::$block => $size,)*
                }
            }

            /// The format of the scales.
            pub fn scale(self) -> ScaleDtype {
                match self {
                    $(Self::$block => ScaleDtype::$scale,)*
                }
            }
        }

        /// The words of [`Dtype`], for documents and their schema.
        #[derive(Deserialize, Serialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        enum Word {
            $($(#[doc = $doc])* #[serde(rename = $word)] $element,)*
            $($(#[doc = $block_doc])* #[serde(rename = $block_word)] $block,)*
        }

        impl From<Word> for Dtype {
            fn from(word: Word) -> Self {
                match word {
                    $(Word::$element => Self::Element(Format::$element),)*
                    $(Word::$block => Self::Block(Block::$block),)*
                }
            }
        }

        impl From<Dtype> for Word {
            fn from(dtype: Dtype) -> Self {
                match dtype {
                    $(Dtype::Element(Format::$element) => Self::$element,)*
                    $(Dtype::Block(Block::$block) => Self::$block,)*
                }
            }
        }
    };
}

/// What codes are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Signed,
    Unsigned,
    Float,
}

formats! {
    elements {
        /// −2…1, four to a byte.
        Int2 "int2": Signed 2,
        /// 0…3, four to a byte.
        Uint2 "uint2": Unsigned 2,
        /// −8…7, two to a byte.
        Int4 "int4": Signed 4,
        /// 0…15, two to a byte.
        Uint4 "uint4": Unsigned 4,
        /// −128…127.
        Int8 "int8": Signed 8,
        /// 0…255.
        Uint8 "uint8": Unsigned 8,
        /// −32768…32767.
        Int16 "int16": Signed 16,
        /// 0…65535.
        Uint16 "uint16": Unsigned 16,
        /// Biases only, whose scale follows from the input's and the weight's.
        Int32 "int32": Signed 32,
        /// 4 exponent bits, 3 mantissa bits, no infinities; largest 448.
        Float8e4m3fn "float8e4m3fn": Float 8,
        /// 4 exponent bits, 3 mantissa bits, no infinities, no negative zero; largest 240.
        Float8e4m3fnuz "float8e4m3fnuz": Float 8,
        /// 5 exponent bits, 2 mantissa bits, as IEEE; largest 57344.
        Float8e5m2 "float8e5m2": Float 8,
        /// 5 exponent bits, 2 mantissa bits, no infinities, no negative zero; largest 57344.
        Float8e5m2fnuz "float8e5m2fnuz": Float 8,
        /// 2 exponent bits, 1 mantissa bit, finite only; largest 6; two to a byte.
        Float4e2m1 "float4e2m1": Float 4,
        /// 2 exponent bits, 3 mantissa bits, finite only; largest 7.5; four in three bytes.
        Float6e2m3 "float6e2m3": Float 6,
        /// 3 exponent bits, 2 mantissa bits, finite only; largest 28; four in three bytes.
        Float6e3m2 "float6e3m2": Float 6,
    }
    blocks {
        /// Blocks of 32 float8e4m3fn with a power-of-two scale.
        Mxfp8 "mxfp8": 32 Float8e4m3fn Float8e8m0,
        /// Blocks of 32 float8e5m2 with a power-of-two scale.
        Mxfp8e5m2 "mxfp8e5m2": 32 Float8e5m2 Float8e8m0,
        /// Blocks of 32 float6e2m3 with a power-of-two scale.
        Mxfp6e2m3 "mxfp6e2m3": 32 Float6e2m3 Float8e8m0,
        /// Blocks of 32 float6e3m2 with a power-of-two scale.
        Mxfp6e3m2 "mxfp6e3m2": 32 Float6e3m2 Float8e8m0,
        /// Blocks of 32 float4e2m1 with a power-of-two scale.
        Mxfp4 "mxfp4": 32 Float4e2m1 Float8e8m0,
        /// Blocks of 32 int8 with a power-of-two scale.
        Mxint8 "mxint8": 32 Int8 Float8e8m0,
        /// Blocks of 16 float4e2m1 with a float8e4m3fn scale, and one float scale for all.
        Nvfp4 "nvfp4": 16 Float4e2m1 Float8e4m3fn,
    }
}

impl Format {
    /// The format with this [`name`](Self::name).
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Whether codes are integers (else they are bit patterns of a small float).
    pub fn is_integer(self) -> bool {
        self.kind() != Kind::Float
    }

    /// Whether negative numbers exist: true for every float.
    pub fn is_signed(self) -> bool {
        self.kind() != Kind::Unsigned
    }

    /// Whether codes are integers that fit a byte.
    pub fn is_byte(self) -> bool {
        self.is_integer() && self.bits() <= 8
    }

    /// Smallest and largest code. A float's codes are its bit patterns, so `(0, 15)`, `(0, 63)` or `(0, 255)`.
    pub fn range(self) -> (i32, i32) {
        if self == Self::Int32 {
            return (i32::MIN, i32::MAX);
        }
        let codes = 1 << self.bits();
        if self.kind() == Kind::Signed { (-codes / 2, codes / 2 - 1) } else { (0, codes - 1) }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A number format of the configuration: one of elements, or one of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "Word", into = "Word")]
pub enum Dtype {
    /// Elements, whose scales are asked for apart.
    Element(Format),
    /// Blocks, which come with their scales.
    Block(Block),
}

impl Dtype {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Element(format) => format.name(),
            Self::Block(block) => block.name(),
        }
    }

    /// The format of the elements.
    #[must_use]
    pub fn format(self) -> Format {
        match self {
            Self::Element(format) => format,
            Self::Block(block) => block.format(),
        }
    }

    /// The format of elements, if it is one.
    #[must_use]
    pub fn element(self) -> Option<Format> {
        match self {
            Self::Element(format) => Some(format),
            Self::Block(_) => None,
        }
    }

    /// The block format, if it is one.
    #[must_use]
    pub fn block(self) -> Option<Block> {
        match self {
            Self::Element(_) => None,
            Self::Block(block) => Some(block),
        }
    }
}

impl From<Format> for Dtype {
    fn from(format: Format) -> Self {
        Self::Element(format)
    }
}

impl From<Block> for Dtype {
    fn from(block: Block) -> Self {
        Self::Block(block)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(feature = "schema")]
impl JsonSchema for Dtype {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Dtype".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = Word::json_schema(generator);
        schema.insert("description".to_owned(), "A number format: one of elements, or one of blocks.".into());
        schema
    }
}

/// The precision that scales are rounded to, to the nearest, half to even. They are stored in the model's own float type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum ScaleDtype {
    /// 24 significant bits.
    #[default]
    Float32,
    /// 11 significant bits, from 2⁻²⁴ to 65504.
    Float16,
    /// 8 significant bits.
    Bfloat16,
    /// 4 significant bits, and one float32 scale for all groups, as NVFP4 has them. Stored as such.
    Float8e4m3fn,
    /// A power of two for each group, as MX formats have them. Stored as such.
    Float8e8m0,
}

impl From<ScaleDtype> for DataType {
    fn from(scale: ScaleDtype) -> Self {
        match scale {
            ScaleDtype::Float32 => Self::Float,
            ScaleDtype::Float16 => Self::Float16,
            ScaleDtype::Bfloat16 => Self::Bfloat16,
            ScaleDtype::Float8e4m3fn => Self::Float8e4m3fn,
            ScaleDtype::Float8e8m0 => Self::Float8e8m0,
        }
    }
}

impl ScaleDtype {
    /// Those that only groups have.
    pub const BLOCKS: [Self; 2] = [Self::Float8e4m3fn, Self::Float8e8m0];

    /// That of scales which are of the type of what they multiply.
    #[must_use]
    pub fn of(float: DataType) -> Self {
        match float {
            DataType::Float16 => Self::Float16,
            DataType::Bfloat16 => Self::Bfloat16,
            _ => Self::Float32,
        }
    }

    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Float8e4m3fn => "float8e4m3fn",
            Self::Float8e8m0 => "float8e8m0",
        }
    }

    /// Whether scales are stored in 8 bits, which only groups have, and beside which there are no zero points.
    #[must_use]
    pub fn is_block(self) -> bool {
        matches!(self, Self::Float8e4m3fn | Self::Float8e8m0)
    }

    /// The type that stores 8-bit scales; `None` for others.
    #[must_use]
    pub fn stored(self) -> Option<DataType> {
        match self {
            Self::Float8e4m3fn => Some(DataType::Float8e4m3fn),
            Self::Float8e8m0 => Some(DataType::Float8e8m0),
            Self::Float32 | Self::Float16 | Self::Bfloat16 => None,
        }
    }
}
