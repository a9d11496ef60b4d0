//! What can go wrong with images: the whole vocabulary of the stores.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::id::ImageId;
use super::manifest::ImageKind;

/// Why a store did not do what it was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// There is no such image.
    #[error("{store} has no image {id}")]
    NotFound {
        /// Which store.
        store: String,
        /// Which image.
        id: ImageId,
    },
    /// An image of that name is there, and was not to be overwritten.
    #[error("{store} has an image {id} already; remove it, take another id, or overwrite it")]
    Exists {
        /// Which store.
        store: String,
        /// Which image.
        id: ImageId,
    },
    /// An image whose bytes are not those that were written. Nothing of it may be used.
    #[error("image {id} of {store} is damaged: {damage}; remove it and compute it again")]
    Damaged {
        /// Which store.
        store: String,
        /// Which image.
        id: ImageId,
        /// What is wrong.
        damage: Damage,
    },
    /// An image that was removed or replaced while it was read.
    #[error("image {id} of {store} was removed or replaced while it was read; open it again")]
    Replaced {
        /// Which store.
        store: String,
        /// Which image.
        id: ImageId,
    },
    /// A prefix where a sequence was wanted, or the other way round.
    #[error("image {id} is a {found} and a {wanted} was wanted")]
    WrongKind {
        /// Which image.
        id: ImageId,
        /// What was wanted.
        wanted: ImageKind,
        /// What it is.
        found: ImageKind,
    },
    /// An image of another model.
    #[error(
        "image {id} is of another model: {difference}; resume it in a session of the model that it was made with"
    )]
    OtherModel {
        /// Which image.
        id: ImageId,
        /// What differs, with both values.
        difference: String,
    },
    /// Whoever writes the image said things that do not go together.
    #[error("image {id} cannot be written: {reason}")]
    Draft {
        /// Which image.
        id: ImageId,
        /// What does not fit.
        reason: String,
    },
    /// A page that the image does not have, or a buffer that it does not fit into.
    #[error(
        "page {index} of image {id} was asked for in {buffer_bytes} bytes; it has {pages} pages of {page_bytes} bytes"
    )]
    NoSuchPage {
        /// Which image.
        id: ImageId,
        /// Which page, among those that are present.
        index: usize,
        /// Pages that are present.
        pages: usize,
        /// Bytes of each.
        page_bytes: usize,
        /// Bytes of the buffer.
        buffer_bytes: usize,
    },
    /// A blob that the image does not have.
    #[error("image {id} has no blob {name:?}")]
    NoSuchBlob {
        /// Which image.
        id: ImageId,
        /// Which blob.
        name: String,
    },
    /// The daemon stops, and what it was at work on with it.
    #[error("the daemon stops: ask the next one again")]
    Stopped,
    /// Another process has the folder.
    #[error("{} belongs to another daemon that runs; give each its own folder", .root.display())]
    Locked {
        /// The store's folder.
        root: PathBuf,
    },
    /// The file system is full, or a quota is.
    #[error(
        "{} is full: {wanted_bytes} bytes were to be written and {free_bytes} are free; remove images, or give the store more room",
        .path.display()
    )]
    Full {
        /// What was to be written.
        path: PathBuf,
        /// Bytes of it.
        wanted_bytes: u64,
        /// Bytes that are free there.
        free_bytes: u64,
    },
    /// The file system said no.
    #[error("{}: cannot {doing}: {source}", .path.display())]
    Io {
        /// What was to be done.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A remote store that does not answer. What was there still is, unless the manifest of what was to replace it was on
    /// its way: then there is either of the two, whole.
    #[error("{name} cannot be reached (given up after {:.1} s): {source}", .after.as_secs_f64())]
    Unreachable {
        /// Which store.
        name: String,
        /// How long was tried.
        after: Duration,
        /// The last thing that went wrong.
        source: Unanswered,
    },
    /// A remote store that answers, and will not do it.
    #[error("{name} refuses: {reason}")]
    Refused {
        /// Which store.
        name: String,
        /// What it said.
        reason: String,
    },
    /// An upload that took so long that it may have been swept.
    #[error(
        "the upload of image {id} to {name} has taken {} s, and one may take {} s: the way there is too slow for so large an image",
        .after.as_secs(), .most.as_secs()
    )]
    TooSlow {
        /// Which store.
        name: String,
        /// Which image.
        id: ImageId,
        /// How long it has taken.
        after: Duration,
        /// How long it may take.
        most: Duration,
    },
    /// An address that leads to no store. What could be a secret in it is not shown.
    #[error("{url} is no store: {reason}")]
    BadUrl {
        /// The address, without user, password and query.
        url: String,
        /// Why not.
        reason: String,
    },
}

/// Why a server counts as one that does not answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unanswered {
    /// It took longer than one operation may.
    #[error("no answer within {:.1} s", .0.as_secs_f64())]
    Timeout(Duration),
    /// The connection was refused, cut or never made.
    #[error("{0}")]
    Broken(String),
    /// It has failed so often that it is left alone for a while.
    #[error("it failed {failures} times in a row and is not asked for another {:.1} s", .retry_in.as_secs_f64())]
    LeftAlone {
        /// Failures in a row.
        failures: u32,
        /// When it is asked again.
        retry_in: Duration,
    },
}

/// What is wrong with an image.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Damage {
    /// A part is not there.
    #[error("{file} is missing")]
    Missing {
        /// Which part.
        file: String,
    },
    /// A part that the file system does not give.
    #[error("it cannot be read: {reason}")]
    Unreadable {
        /// What the file system said.
        reason: String,
    },
    /// A part is too short or too long.
    #[error("{file} has {found} bytes instead of {expected}")]
    Length {
        /// Which part.
        file: String,
        /// Bytes that it was written with.
        expected: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// What begins as no manifest does.
    #[error("{file} is no manifest")]
    NoManifest {
        /// Which part.
        file: String,
    },
    /// A manifest of another version of the format.
    #[error("{file} has version {found} and this daemon reads version {known}")]
    Version {
        /// Which part.
        file: String,
        /// Its version.
        found: u32,
        /// What is known here.
        known: u32,
    },
    /// A manifest whose seal does not fit.
    #[error("{file} has the BLAKE3 sum {found} instead of {expected}")]
    Seal {
        /// Which part.
        file: String,
        /// The sum that it carries, hex.
        expected: String,
        /// The sum of what is there, hex.
        found: String,
    },
    /// A manifest that is sealed and makes no sense.
    #[error("{file}: {reason}")]
    Content {
        /// Which part.
        file: String,
        /// What does not go together.
        reason: String,
    },
    /// A page whose checksum does not fit.
    #[error("page {page} in {file} has the CRC-32C {found:08x} instead of {expected:08x}")]
    Page {
        /// Which part.
        file: String,
        /// Which page, among those that are present.
        page: usize,
        /// The manifest's checksum.
        expected: u32,
        /// The checksum of what is there.
        found: u32,
    },
    /// A blob whose checksum does not fit.
    #[error("blob {name:?} in {file} has the CRC-32C {found:08x} instead of {expected:08x}")]
    Blob {
        /// Which part.
        file: String,
        /// Which blob.
        name: String,
        /// The manifest's checksum.
        expected: u32,
        /// The checksum of what is there.
        found: u32,
    },
}
