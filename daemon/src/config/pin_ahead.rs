//! How much of the arena is made ready before anybody asks for it: a word, or bytes.

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

/// How much of the arena is made ready ahead of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PinAhead {
    /// What the device asks for.
    Auto,
    /// All of it.
    All,
    /// So much.
    Bytes(ByteSize),
}

impl PinAhead {
    /// Bytes of an arena; `auto_bytes` is what the device asks for.
    #[must_use]
    pub fn bytes(self, arena_bytes: u64, auto_bytes: u64) -> u64 {
        match self {
            Self::Auto => auto_bytes,
            Self::All => arena_bytes,
            Self::Bytes(bytes) => bytes.as_u64(),
        }
        .min(arena_bytes)
    }
}

impl std::fmt::Display for PinAhead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::All => f.write_str("all"),
            Self::Bytes(bytes) => write!(f, "{bytes}"),
        }
    }
}

impl std::str::FromStr for PinAhead {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "all" => Ok(Self::All),
            bytes => bytes.parse().map(Self::Bytes).map_err(|_| {
                format!("'{text}' is neither `auto` nor `all` nor a number of bytes like 64GiB")
            }),
        }
    }
}

impl Serialize for PinAhead {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Bytes(bytes) => bytes.serialize(serializer),
            word => serializer.collect_str(word),
        }
    }
}

impl<'de> Deserialize<'de> for PinAhead {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "it must be `auto`, `all` or a number of bytes, as \"64GiB\"")]
        enum Given {
            Bytes(u64),
            Text(String),
        }
        match Given::deserialize(deserializer)? {
            Given::Bytes(bytes) => Ok(Self::Bytes(ByteSize::b(bytes))),
            Given::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}
