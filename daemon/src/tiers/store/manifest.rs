//! What an image says about itself.

use std::fmt;

use kvoyant_protocol::EXTENT_BYTES;
use serde::{Deserialize, Serialize};

use super::error::{Damage, StoreError};
use super::id::ImageId;
use super::pages::PageTable;
use super::seal::{seal, unseal};

/// How every manifest begins.
const MAGIC: &[u8; 8] = b"KVIMAGE\0";

/// Most bytes of each of a manifest's texts.
pub const TEXT_MAX: usize = 64 << 10;

/// Most blobs of an image: a few for each layer.
pub const BLOBS_MAX: usize = 1 << 16;

/// Most bytes of a blob, which is read as a whole.
pub const BLOB_MAX: u64 = 4 << 30;

/// Most bytes of a blob's name.
pub const BLOB_NAME_MAX: usize = 128;

/// Most layers or KV heads of a model; far beyond any, it only keeps products small.
const HEADS_MAX: u32 = 1 << 16;

/// What an image is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageKind {
    /// A suspended sequence, to be resumed.
    Sequence,
    /// A published prefix, to be attached to.
    Prefix,
}

impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sequence => "sequence",
            Self::Prefix => "prefix",
        })
    }
}

/// What must be the same where an image is read: otherwise its rows mean nothing there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelKey {
    /// Fingerprint of the weights, hex.
    pub fingerprint: String,
    /// The adapter on top of them; empty: none.
    pub adapter: String,
    /// Decoder layers.
    pub layers: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Values of one head's key; of a latent row, all of its values.
    pub head_dim: u32,
    /// Values of a latent row that are its value; 0: a row is a key and a value.
    pub latent_values: u32,
    /// Code of the storage format.
    pub dtype: u8,
    /// Rows per page.
    pub page_rows: u32,
    /// Bytes of one row of one KV head.
    pub row_bytes: u32,
}

impl ModelKey {
    /// Bytes of a page; `None` if they are 0, or more than an extent holds.
    #[must_use]
    pub fn page_bytes(&self) -> Option<usize> {
        let bytes = u64::from(self.page_rows) * u64::from(self.row_bytes);
        (1..=EXTENT_BYTES as u64).contains(&bytes).then_some(bytes as usize)
    }

    /// Heads of all layers together; `None` if there are none, or absurdly many.
    #[must_use]
    pub fn heads(&self) -> Option<usize> {
        let fits = |count: u32| (1..=HEADS_MAX).contains(&count);
        (fits(self.layers) && fits(self.kv_heads)).then_some(self.layers as usize * self.kv_heads as usize)
    }

    /// What differs first between this key, an image's, and a session's; `None` if nothing does.
    #[must_use]
    pub fn mismatch(&self, session: &Self) -> Option<String> {
        let texts = [
            ("fingerprint", &self.fingerprint, &session.fingerprint),
            ("adapter", &self.adapter, &session.adapter),
        ];
        let numbers = [
            ("layers", self.layers, session.layers),
            ("KV heads", self.kv_heads, session.kv_heads),
            ("head dim", self.head_dim, session.head_dim),
            ("latent values", self.latent_values, session.latent_values),
            ("storage format", self.dtype.into(), session.dtype.into()),
            ("rows per page", self.page_rows, session.page_rows),
            ("bytes per row", self.row_bytes, session.row_bytes),
        ];
        let say = |name: &str, image: &dyn fmt::Debug, session: &dyn fmt::Debug| {
            format!("{name}: {image:?} in the image, {session:?} in the session")
        };
        let text = texts.iter().find(|(_, image, session)| image != session);
        let number = numbers.iter().find(|(_, image, session)| image != session);
        text.map(|(name, image, session)| say(name, image, session))
            .or_else(|| number.map(|(name, image, session)| say(name, image, session)))
    }
}

/// A named run of bytes beside the pages: digests, statistics, marks, tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobEntry {
    /// Its name, the only one in its image.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// CRC-32C of its bytes.
    pub crc32c: u32,
}

/// What an image says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What it is of.
    pub kind: ImageKind,
    /// The model.
    pub model: ModelKey,
    /// The user whose text it is.
    pub uid: u32,
    /// When it was made, in seconds since 1970.
    pub created_unix: u64,
    /// Specification of the sequence's method.
    pub method: String,
    /// Seed of the sequence, for methods that draw.
    pub seed: u64,
    /// Rows of each layer.
    pub lens: Vec<u32>,
    /// Tokens that it is worth.
    pub tokens: u32,
    /// Which pages there are. The writer fills in their checksums.
    pub pages: PageTable,
    /// What else there is, in the order written. The writer fills it in.
    pub blobs: Vec<BlobEntry>,
    /// Whatever its owner calls it.
    pub label: String,
}

impl Manifest {
    /// Bytes of each page. A manifest that was read or sealed has a size that is one.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.model.page_bytes().unwrap_or(0)
    }

    /// Bytes of all pages that are present.
    #[must_use]
    pub fn pages_bytes(&self) -> u64 {
        self.pages.present() as u64 * self.page_bytes() as u64
    }

    /// Bytes of all blobs.
    #[must_use]
    pub fn blobs_bytes(&self) -> u64 {
        self.blobs.iter().map(|blob| blob.bytes).sum()
    }

    /// Refuses an image that is of something else than is wanted.
    pub fn expect(&self, id: &ImageId, kind: ImageKind, session: &ModelKey) -> Result<(), StoreError> {
        if self.kind != kind {
            return Err(StoreError::WrongKind { id: id.clone(), wanted: kind, found: self.kind });
        }
        match self.model.mismatch(session) {
            Some(difference) => Err(StoreError::OtherModel { id: id.clone(), difference }),
            None => Ok(()),
        }
    }

    /// What does not go together in it, if anything. Holds for everything that is written, and is asked again of
    /// everything that is read.
    pub(super) fn check(&self) -> Result<(), String> {
        let Some(heads) = self.model.heads() else {
            return Err(format!("{} layers of {} KV heads", self.model.layers, self.model.kv_heads));
        };
        if self.model.page_bytes().is_none() {
            let (rows, bytes) = (self.model.page_rows, self.model.row_bytes);
            return Err(format!(
                "pages of {rows} rows of {bytes} bytes; a page has 1..={EXTENT_BYTES} bytes"
            ));
        }
        if self.lens.len() != self.model.layers as usize {
            return Err(format!("{} lengths for {} layers", self.lens.len(), self.model.layers));
        }
        self.pages.check(heads)?;
        let heads_of = self.pages.counts().chunks(self.model.kv_heads as usize);
        for (layer, (rows, counts)) in self.lens.iter().zip(heads_of).enumerate() {
            let needed = rows.div_ceil(self.model.page_rows);
            if let Some(pages) = counts.iter().find(|pages| **pages < needed) {
                return Err(format!("layer {layer} has {rows} rows and a head with {pages} pages for them"));
            }
        }
        let most = self.lens.iter().copied().max().unwrap_or(0);
        if self.tokens > most {
            return Err(format!("{} tokens, and no layer has more than {most} rows", self.tokens));
        }
        let texts = [
            ("fingerprint", &self.model.fingerprint),
            ("adapter", &self.model.adapter),
            ("method", &self.method),
            ("label", &self.label),
        ];
        if let Some((name, text)) = texts.iter().find(|(_, text)| text.len() > TEXT_MAX) {
            return Err(format!("its {name} has {} bytes and may have {TEXT_MAX}", text.len()));
        }
        self.check_blobs()
    }

    fn check_blobs(&self) -> Result<(), String> {
        if self.blobs.len() > BLOBS_MAX {
            return Err(format!("{} blobs; an image has at most {BLOBS_MAX}", self.blobs.len()));
        }
        let mut names: Vec<_> = self.blobs.iter().map(|blob| blob.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("two blobs of the name {:?}", twice[0]));
        }
        if let Some(name) = names.iter().find(|name| !(1..=BLOB_NAME_MAX).contains(&name.len())) {
            return Err(format!("a blob's name has {} bytes; 1..={BLOB_NAME_MAX} are good", name.len()));
        }
        if let Some(blob) = self.blobs.iter().find(|blob| blob.bytes > BLOB_MAX) {
            return Err(format!("blob {:?} has {} bytes and may have {BLOB_MAX}", blob.name, blob.bytes));
        }
        Ok(())
    }

    /// Writes it down, sealed.
    pub(super) fn encode(&self) -> Result<Vec<u8>, String> {
        self.check()?;
        seal(MAGIC, self)
    }

    /// Reads it back. `file` names it in errors.
    pub(super) fn decode(record: &[u8], file: &str) -> Result<Self, Damage> {
        let manifest: Self = unseal(MAGIC, record, file)?;
        manifest.check().map_err(|reason| Damage::Content { file: file.to_owned(), reason })?;
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{manifest, model};
    use super::*;

    #[test]
    fn a_manifest_comes_back_as_it_was() {
        let manifest = manifest(1, |_, page| page != 1);
        assert_eq!(Manifest::decode(&manifest.encode().unwrap(), "m").unwrap(), manifest);
    }

    #[test]
    fn a_mismatch_names_what_differs() {
        let key = model();
        assert_eq!(key.mismatch(&key), None);
        let other = ModelKey { head_dim: 64, ..key.clone() };
        assert_eq!(key.mismatch(&other).unwrap(), "head dim: 4 in the image, 64 in the session");
        let other = ModelKey { adapter: "lora".into(), ..key.clone() };
        assert!(key.mismatch(&other).unwrap().contains("\"lora\""));
        let changes: [fn(&mut ModelKey); 9] = [
            |key| key.fingerprint.push('0'),
            |key| key.adapter.push('0'),
            |key| key.layers += 1,
            |key| key.kv_heads += 1,
            |key| key.head_dim += 1,
            |key| key.latent_values += 1,
            |key| key.dtype += 1,
            |key| key.page_rows += 1,
            |key| key.row_bytes += 1,
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut other = key.clone();
            change(&mut other);
            assert!(key.mismatch(&other).is_some(), "field {index}");
        }
    }

    #[test]
    fn what_does_not_go_together_is_not_written() {
        let good = manifest(1, |_, _| true);
        type Change = fn(&mut Manifest);
        let bad: [(&str, Change); 9] = [
            ("lengths", |m| m.lens.push(0)),
            ("layers", |m| m.model.layers = 0),
            ("KV heads", |m| m.model.kv_heads = u32::MAX),
            ("rows", |m| m.model.row_bytes = u32::MAX),
            ("pages for them", |m| m.lens[0] = 1000),
            ("no layer has more", |m| m.tokens = 1000),
            ("label", |m| m.label = "a".repeat(TEXT_MAX + 1)),
            ("name", |m| m.blobs.push(BlobEntry { name: String::new(), bytes: 0, crc32c: 0 })),
            ("two blobs", |m| {
                m.blobs = vec![BlobEntry { name: "a".into(), bytes: 0, crc32c: 0 }; 2];
            }),
        ];
        for (says, change) in bad {
            let mut manifest = good.clone();
            change(&mut manifest);
            let reason = manifest.encode().unwrap_err();
            assert!(reason.contains(says), "{reason} does not say {says}");
        }
    }
}
