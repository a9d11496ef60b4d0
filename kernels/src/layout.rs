//! What a row of a KV cache is made of, whatever format its values have: a key and a value, or one latent that serves as both.

use std::fmt;
use std::str::FromStr;

use crate::quantise::{Format, UnknownFormat};
use crate::{Dtype, Kernels};

/// What a row holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowLayout {
    /// `[k(d) | v(d)]`, each half stored in the format on its own.
    KeyValue {
        /// Values of a key, and of a value.
        d: usize,
        /// How each half is stored.
        format: Format,
    },
    /// One latent, as of multi-head latent attention (DeepSeek-V2, 2024): all of it is the key, its first part the value. The two parts
    /// `[c(value) | rope(dim − value)]` are stored in the format each on its own.
    Latent {
        /// Values of the latent: `d_c + d_rope`.
        dim: usize,
        /// How many of them, from the first on, are the value: `d_c`.
        value: usize,
        /// How each part is stored.
        format: Format,
    },
}

/// Where keys and values are in rows of a plain type.
#[derive(Clone, Copy)]
pub(crate) struct RowShape {
    /// Values of a key, which a row begins with.
    pub(crate) keys: usize,
    /// Values of a value.
    pub(crate) values: usize,
    /// Where in a row the value begins, in bytes.
    pub(crate) column: usize,
    /// From one row to the next.
    pub(crate) row_bytes: usize,
}

impl RowShape {
    /// Rows `[k(d) | v(d)]`.
    pub(crate) const fn pairs(d: usize, dtype: Dtype) -> Self {
        let half = d * dtype.bytes();
        Self { keys: d, values: d, column: half, row_bytes: 2 * half }
    }
}

/// Most values of a key or a value: so many fit into a [`RowLayout::code`].
const MOST: usize = (1 << 24) - 1;

impl RowLayout {
    /// How the values are stored.
    #[must_use]
    pub const fn format(self) -> Format {
        match self {
            Self::KeyValue { format, .. } | Self::Latent { format, .. } => format,
        }
    }

    /// Values of a key, and so of a query.
    #[must_use]
    pub const fn key_values(self) -> usize {
        match self {
            Self::KeyValue { d, .. } => d,
            Self::Latent { dim, .. } => dim,
        }
    }

    /// Values of a value, and so of an answer.
    #[must_use]
    pub const fn value_values(self) -> usize {
        match self {
            Self::KeyValue { d, .. } => d,
            Self::Latent { value, .. } => value,
        }
    }

    /// The values of the two parts that a row is stored as.
    const fn parts(self) -> [usize; 2] {
        match self {
            Self::KeyValue { d, .. } => [d, d],
            Self::Latent { dim, value, .. } => [value, dim - value],
        }
    }

    /// Bytes of a part.
    const fn part_bytes(self, values: usize) -> Option<usize> {
        match self.format() {
            _ if values == 0 => Some(0),
            Format::Plain(dtype) => Some(values * dtype.bytes()),
            format => format.row_bytes(values),
        }
    }

    /// Bytes of a row. `None` where there are no such rows: a key or a value without values, a value longer than its latent, a part
    /// that [the format](Format::row_bytes) cannot store, or 2²⁴ values or more.
    #[must_use]
    pub const fn row_bytes(self) -> Option<usize> {
        let (keys, values) = (self.key_values(), self.value_values());
        if values == 0 || values > keys || keys > MOST {
            return None;
        }
        let [first, second] = self.parts();
        match (self.part_bytes(first), self.part_bytes(second)) {
            (Some(first), Some(second)) => Some(first + second),
            _ => None,
        }
    }

    /// [`RowLayout::row_bytes`], of rows that there are.
    pub(crate) fn checked_row_bytes(self, what: &str) -> usize {
        self.row_bytes().unwrap_or_else(|| panic!("{what}: there are no rows {self}"))
    }

    /// The storage type and shape of rows that are not quantised.
    pub(crate) fn plain(self) -> Option<(Dtype, RowShape)> {
        let Format::Plain(dtype) = self.format() else { return None };
        let shape = match self {
            Self::KeyValue { d, .. } => RowShape::pairs(d, dtype),
            Self::Latent { dim, value, .. } => {
                RowShape { keys: dim, values: value, column: 0, row_bytes: dim * dtype.bytes() }
            }
        };
        Some((dtype, shape))
    }

    /// The shape of rows of a key and a value in [`Format::Int8`], each followed by its scale.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn pairs_in_8_bits(self) -> Option<RowShape> {
        match self {
            Self::KeyValue { d, format: Format::Int8 } => {
                let half = d + size_of::<f32>();
                Some(RowShape { keys: d, values: d, column: half, row_bytes: 2 * half })
            }
            _ => None,
        }
    }

    /// The shape of rows once they are dequantised to f32.
    pub(crate) fn decoded(self) -> RowShape {
        match self {
            Self::KeyValue { d, .. } => RowShape::pairs(d, Dtype::F32),
            Self::Latent { dim, value, .. } => {
                RowShape { keys: dim, values: value, column: 0, row_bytes: 4 * dim }
            }
        }
    }

    /// Dequantises both parts of a row one after the other, calling `dequantise` for each.
    #[inline(always)]
    pub(crate) fn decode_row(
        self,
        row: &[u8],
        to: &mut [f32],
        mut dequantise: impl FnMut(Format, &[u8], &mut [f32]),
    ) {
        let [first, second] = self.parts();
        let (row, rest) = row.split_at(self.part_bytes(first).unwrap_or(0));
        let (to, beyond) = to.split_at_mut(first);
        dequantise(self.format(), row, to);
        if second > 0 {
            dequantise(self.format(), rest, beyond);
        }
    }

    /// Stores a row. Values are finite; a NaN or an infinity stays one in plain formats only.
    ///
    /// `key` is `[key_values]`, `value` is `[value_values]`; of a latent, whose key holds the value, `value` is empty.
    ///
    /// # Panics
    /// Where there are no such rows, or a slice has the wrong length.
    pub fn encode(self, key: &[f32], value: &[f32], row: &mut [u8]) {
        let bytes = self.checked_row_bytes("encode");
        assert!(row.len() == bytes, "encode: {} bytes for a row {self} of {bytes}", row.len());
        assert_eq!(key.len(), self.key_values(), "encode: the key of a row {self}");
        let (first, second) = match self {
            Self::KeyValue { d, .. } => {
                assert_eq!(value.len(), d, "encode: the value of a row {self}");
                (key, value)
            }
            Self::Latent { value: values, .. } => {
                assert!(value.is_empty(), "encode: a latent's value is a part of its key");
                key.split_at(values)
            }
        };
        let (row, rest) = row.split_at_mut(self.part_bytes(first.len()).unwrap_or(0));
        store(self.format(), first, row);
        if !second.is_empty() {
            store(self.format(), second, rest);
        }
    }

    /// Reads the keys of rows: `keys` is `[n][key_values]`.
    ///
    /// # Panics
    /// Where there are no such rows, or `rows` and `keys` are not of n rows both.
    pub fn decode_keys(self, rows: &[u8], keys: &mut [f32]) {
        let kernels = Kernels::best();
        let (bytes, n) = (self.checked_row_bytes("decode_keys"), self.key_values());
        assert!(
            rows.len().is_multiple_of(bytes) && rows.len() / bytes * n == keys.len(),
            "decode_keys: {} bytes of rows {self} for {} values",
            rows.len(),
            keys.len()
        );
        for (row, key) in rows.chunks_exact(bytes).zip(keys.chunks_exact_mut(n)) {
            match self {
                Self::KeyValue { .. } => self.first_part(kernels, row, key),
                Self::Latent { .. } => {
                    self.decode_row(row, key, |format, row, key| kernels.dequantise(format, row, key));
                }
            }
        }
    }

    /// Reads the values of rows: `values` is `[n][value_values]`.
    ///
    /// # Panics
    /// Where there are no such rows, or `rows` and `values` are not of n rows both.
    pub fn decode_values(self, rows: &[u8], values: &mut [f32]) {
        let kernels = Kernels::best();
        let (bytes, n) = (self.checked_row_bytes("decode_values"), self.value_values());
        assert!(
            rows.len().is_multiple_of(bytes) && rows.len() / bytes * n == values.len(),
            "decode_values: {} bytes of rows {self} for {} values",
            rows.len(),
            values.len()
        );
        for (row, value) in rows.chunks_exact(bytes).zip(values.chunks_exact_mut(n)) {
            match self {
                Self::KeyValue { .. } => kernels.dequantise(self.format(), &row[bytes / 2..], value),
                Self::Latent { .. } => self.first_part(kernels, row, value),
            }
        }
    }

    fn first_part(self, kernels: Kernels, row: &[u8], to: &mut [f32]) {
        let bytes = self.part_bytes(to.len()).unwrap_or(0);
        kernels.dequantise(self.format(), &row[..bytes], to);
    }

    /// The number that stands for this layout in binary formats; never changes. `None` where there are no such rows.
    ///
    /// From the lowest byte up: 0 for a key and a value, 1 for a latent; [`Format::code`]; three bytes of values of a key; three bytes of
    /// values of a value.
    #[must_use]
    pub fn code(self) -> Option<u64> {
        self.row_bytes()?;
        let kind = u64::from(matches!(self, Self::Latent { .. }));
        let (keys, values) = (self.key_values() as u64, self.value_values() as u64);
        Some(kind | u64::from(self.format().code()) << 8 | keys << 16 | values << 40)
    }

    /// The inverse of [`RowLayout::code`]; `None` for a code that stands for nothing.
    #[must_use]
    pub fn from_code(code: u64) -> Option<Self> {
        let (kind, format) = (code & 0xff, Format::from_code((code >> 8 & 0xff) as u8)?);
        let (keys, value) = ((code >> 16) as usize & MOST, (code >> 40) as usize);
        let layout = match kind {
            0 if keys == value => Self::KeyValue { d: keys, format },
            1 => Self::Latent { dim: keys, value, format },
            _ => return None,
        };
        layout.row_bytes().map(|_| layout)
    }
}

/// Stores a part; plain ones of any length.
fn store(format: Format, values: &[f32], row: &mut [u8]) {
    match format {
        Format::Plain(dtype) => Kernels::best().from_f32(dtype, values, row),
        _ => format.quantise(values, row),
    }
}

impl fmt::Display for RowLayout {
    /// `kv:128:f16`, or `latent:576:512:int8`: the latent's values and how many of them are the value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KeyValue { d, format } => write!(f, "kv:{d}:{format}"),
            Self::Latent { dim, value, format } => write!(f, "latent:{dim}:{value}:{format}"),
        }
    }
}

/// A text that names no row layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownLayout {
    /// It has another form.
    #[error("'{text}' is no row layout; use kv:D:FORMAT or latent:DIM:VALUE:FORMAT, as in kv:128:f16")]
    Form {
        /// What was given.
        text: String,
    },
    /// Its last part names no format.
    #[error(transparent)]
    Format(#[from] UnknownFormat),
    /// It has the form, but there are no such rows.
    #[error(
        "there are no rows '{text}'; a value has 1 to as many values as its key, and formats other than plain ones need a multiple of \
         their group (int4) or of 4"
    )]
    NoRows {
        /// What was given.
        text: String,
    },
}

impl FromStr for RowLayout {
    type Err = UnknownLayout;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || UnknownLayout::Form { text: text.to_owned() };
        let number = |part: &str| part.parse::<usize>().map_err(|_| form());
        let parts: Vec<&str> = text.split(':').collect();
        let layout = match parts[..] {
            ["kv", d, format] => Self::KeyValue { d: number(d)?, format: format.parse()? },
            ["latent", dim, value, format] => {
                Self::Latent { dim: number(dim)?, value: number(value)?, format: format.parse()? }
            }
            _ => return Err(form()),
        };
        match layout.row_bytes() {
            Some(_) => Ok(layout),
            None => Err(UnknownLayout::NoRows { text: text.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [Format; 7] = Format::ALL;

    #[test]
    fn names_and_codes_come_back_as_the_layout_they_stand_for() {
        for format in FORMATS {
            for layout in
                [RowLayout::KeyValue { d: 128, format }, RowLayout::Latent { dim: 576, value: 512, format }]
            {
                assert_eq!(layout.to_string().parse(), Ok(layout));
                assert_eq!(RowLayout::from_code(layout.code().unwrap()), Some(layout));
            }
        }
        assert_eq!(RowLayout::KeyValue { d: 128, format: Format::Int8 }.code(), Some(0x0000_8000_0080_0400));
    }

    #[test]
    fn texts_and_codes_that_stand_for_nothing_are_refused() {
        let refused = |text: &str| text.parse::<RowLayout>().unwrap_err().to_string();
        assert!(refused("kv:128").starts_with("'kv:128' is no row layout"));
        assert!(refused("kv:x:f16").starts_with("'kv:x:f16' is no row layout"));
        assert!(refused("kv:128:f17").starts_with("'f17' is no format"));
        for text in ["kv:0:f16", "latent:64:65:f16", "latent:64:0:f32", "kv:96:int4-g64", "kv:16777216:f16"] {
            assert!(refused(text).starts_with("there are no rows"), "{text}");
        }
        assert_eq!(RowLayout::from_code(2), None);
        assert_eq!(RowLayout::from_code(0x00ff), None);
        // A key and a value of different lengths.
        assert_eq!(RowLayout::from_code(0x0000_4000_0080_0100), None);
    }

    #[test]
    fn rows_are_as_long_as_their_parts() {
        let bytes = |text: &str| text.parse::<RowLayout>().unwrap().row_bytes().unwrap();
        assert_eq!(bytes("kv:128:f16"), 512);
        assert_eq!(bytes("kv:3:f32"), 24);
        assert_eq!(bytes("kv:128:int8"), 264);
        assert_eq!(bytes("latent:576:512:bf16"), 1152);
        assert_eq!(bytes("latent:576:512:int8"), 584);
        assert_eq!(bytes("latent:512:512:fp8-e4m3"), 512);
    }

    #[test]
    fn keys_and_values_are_read_from_where_they_were_stored() {
        let values: Vec<f32> = (0..192_u8).map(|j| f32::from(j) - 90.0).collect();
        for format in FORMATS {
            let layout = RowLayout::KeyValue { d: 64, format };
            let mut rows = vec![0; 2 * layout.row_bytes().unwrap()];
            for row in rows.chunks_exact_mut(layout.row_bytes().unwrap()) {
                layout.encode(&values[..64], &values[64..128], row);
            }
            let (mut keys, mut read) = (vec![0.0; 128], vec![0.0; 128]);
            layout.decode_keys(&rows, &mut keys);
            layout.decode_values(&rows, &mut read);
            for t in 0..2 {
                for j in 0..64 {
                    assert!((keys[t * 64 + j] - values[j]).abs() <= 4.0, "{format}");
                    assert!((read[t * 64 + j] - values[64 + j]).abs() <= 4.0, "{format}");
                }
            }
            let layout = RowLayout::Latent { dim: 192, value: 128, format };
            let mut row = vec![0; layout.row_bytes().unwrap()];
            layout.encode(&values, &[], &mut row);
            let (mut key, mut value) = (vec![0.0; 192], vec![0.0; 128]);
            layout.decode_keys(&row, &mut key);
            layout.decode_values(&row, &mut value);
            assert!(key.iter().zip(&values).all(|(read, value)| (read - value).abs() <= 5.0), "{format}");
            assert_eq!(value, key[..128], "{format}");
        }
    }
}
