//! What an operator calls a device: `host`, `cuda` or `cuda:N`.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The name of a device, as in `--device`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DeviceName {
    /// The processor that the daemon runs on.
    #[default]
    Host,
    /// A GPU, by the ordinal that the driver gives it (after `CUDA_VISIBLE_DEVICES`).
    Cuda(u32),
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.pad("host"),
            Self::Cuda(ordinal) => f.pad(&format!("cuda:{ordinal}")),
        }
    }
}

/// A text that names no device.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BadDeviceName {
    /// No kind of device is called so.
    #[error("'{text}' is no device; use host, or a GPU by its number, as in cuda:0")]
    Unknown {
        /// What was given.
        text: String,
    },
    /// What follows `cuda:` is no number.
    #[error("'{text}' names no GPU: what follows 'cuda:' is the number that nvidia-smi shows, as in cuda:0")]
    Ordinal {
        /// What was given.
        text: String,
    },
}

impl FromStr for DeviceName {
    type Err = BadDeviceName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "host" => Ok(Self::Host),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            // `parse` would take a sign as well.
            Some(("cuda", ordinal)) if ordinal.bytes().all(|byte| byte.is_ascii_digit()) => {
                ordinal.parse().map(Self::Cuda).map_err(|_| BadDeviceName::Ordinal { text: text.to_owned() })
            }
            Some(("cuda", _)) => Err(BadDeviceName::Ordinal { text: text.to_owned() }),
            _ => Err(BadDeviceName::Unknown { text: text.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_host_cuda_and_cuda_with_an_ordinal() {
        for (text, name) in [
            ("host", DeviceName::Host),
            ("cuda", DeviceName::Cuda(0)),
            ("cuda:0", DeviceName::Cuda(0)),
            ("cuda:7", DeviceName::Cuda(7)),
        ] {
            assert_eq!(text.parse(), Ok(name));
            assert_eq!(name.to_string().parse(), Ok(name));
        }
    }

    #[test]
    fn anything_else_is_refused_with_what_would_be_right() {
        for text in ["", "tpu", "CUDA", "host:0", "gpu:0", " cuda:0"] {
            assert_eq!(text.parse::<DeviceName>(), Err(BadDeviceName::Unknown { text: text.into() }));
        }
        for text in ["cuda:", "cuda:x", "cuda:-1", "cuda:+1", "cuda:0 ", "cuda:4294967296"] {
            let error = text.parse::<DeviceName>().unwrap_err();
            assert!(error.to_string().contains("cuda:0"), "{error}");
            assert_eq!(error, BadDeviceName::Ordinal { text: text.into() });
        }
    }
}
