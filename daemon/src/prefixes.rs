//! Published prefixes: rows that many sequences begin with, kept once.
//!
//! Blocks of one page of each layer and KV head are known by chained hashes ([`crate::tiers::prefix`]); their rows lie in extents that
//! clients can only read ([`crate::tiers::shared`]), and in images if the daemon keeps any, from where they come back when the host had
//! to make room for others, or after a restart.
//!
//! Everything here may block for as long as a copy or a disk takes, and runs beside the control plane; only an [`Attachment`] is dropped
//! wherever its last sequence is closed, which waits for nobody: whoever looks at the index next takes note of it.

mod images;
mod load;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam::queue::SegQueue;
use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::memory::MemoryError;
use thiserror::Error;

use crate::keeper::Keeper;
use crate::tiers::budget::ArenaBudget;
use crate::tiers::pool::NOBODY;
use crate::tiers::prefix::{
    BlockHash, Evictions, Handle, Limits, Place, PrefixError, PrefixIndex, PrefixKey, Scope, Tier, chain,
};
use crate::tiers::shared::{SharedBudget, SharedExtent, SharedPage, SharedPages};
use crate::tiers::store::{ImageId, ImageKind, Manifest, ModelKey, PageTable, StoreError};
pub(crate) use images::is_image;
use images::{BLOCKS, Blocks, Images, image_of};

/// How many times as much may lie in images as on the host.
const STORED_SHARE: u64 = 16;

/// Most publications that wait to be written.
const WAITING_MAX: usize = 16;

/// Most tokens that are looked up or published at once.
pub const TOKENS_MAX: u32 = 1 << 24;

/// One block's rows, `[layer][KV head]`.
#[derive(Debug)]
pub struct Block(Vec<SharedPage>);

impl Block {
    /// Its pages.
    #[must_use]
    pub fn pages(&self) -> &[SharedPage] {
        &self.0
    }
}

/// Why nothing was published or attached to.
#[derive(Debug, Error)]
pub enum PrefixFailure {
    /// No extent for it, although all that nobody uses has gone.
    #[error(
        "no room for published prefixes: {wanted_bytes} bytes are needed and {free_bytes} can be had; raise the daemon's `prefixes`, or its arena"
    )]
    Full {
        /// Bytes that were wanted: of blocks, or of whole extents.
        wanted_bytes: u64,
        /// Bytes that can be had.
        free_bytes: u64,
    },
    /// No memory for it.
    #[error("no memory for published prefixes: {0}")]
    Memory(#[from] MemoryError),
    /// The index refused.
    #[error(transparent)]
    Index(#[from] PrefixError),
    /// An image could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A prefix that sequences hold on to.
#[derive(Debug)]
pub struct Attachment {
    prefixes: Arc<Prefixes>,
    handle: Handle,
    blocks: Vec<Arc<Block>>,
}

impl Attachment {
    /// Its blocks, in order.
    #[must_use]
    pub fn blocks(&self) -> &[Arc<Block>] {
        &self.blocks
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.prefixes.let_go.push(self.handle);
    }
}

/// Blocks that are to be published, and where their rows go.
#[derive(Debug)]
pub struct Draft {
    root: BlockHash,
    hashes: Vec<BlockHash>,
    known: usize,
    block_bytes: u64,
    model: ModelKey,
    shared: bool,
    blocks: Vec<Arc<Block>>,
    /// Blocks that were known before: they stay until the others are published.
    held: Option<Attachment>,
}

impl Draft {
    /// Blocks that were known before.
    #[must_use]
    pub fn known(&self) -> usize {
        self.known
    }

    /// Blocks in all.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.hashes.len()
    }

    /// Where a new block's rows of a head go, by the block's number from the root on.
    #[must_use]
    pub fn page(&self, block: usize, head: usize) -> Option<&SharedPage> {
        self.blocks.get(block.checked_sub(self.known)?)?.pages().get(head)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Prefixes {
    index: Mutex<PrefixIndex<Arc<Block>>>,
    /// What nobody is attached to any more, and the index does not know yet.
    let_go: SegQueue<Handle>,
    groups: Mutex<HashMap<(Scope, usize), Arc<SharedPages>>>,
    budget: Arc<SharedBudget>,
    host_bytes: u64,
    keeper: Option<Arc<Keeper>>,
    salt: Vec<u8>,
    /// What the images that it writes are labelled with: others of a remote store are other daemons', to whom it leaves them.
    node: String,
    /// Whose turn it is to write.
    keeping: Mutex<()>,
    /// How many wait for that.
    waiting: AtomicUsize,
}

impl Prefixes {
    /// Those that the keeper has, and none on the host yet. `host_bytes` bounds what all of them take there, in whole extents; they may have
    /// one in any case.
    ///
    /// # Errors
    /// A folder of images that cannot be read.
    pub fn start(
        budget: Arc<ArenaBudget>,
        host_bytes: u64,
        keeper: Option<Arc<Keeper>>,
    ) -> Result<Arc<Self>, StoreError> {
        let salt = match &keeper {
            Some(keeper) => keeper.salt()?,
            None => fresh_salt(),
        };
        let node = blake3::derive_key("kvoyant 2026-12 which daemon wrote a prefix", &salt);
        let node = blake3::Hash::from_bytes(node).to_hex()[..16].to_owned();
        let stored_bytes = if keeper.is_some() { host_bytes.saturating_mul(STORED_SHARE) } else { 0 };
        let index = Mutex::new(PrefixIndex::new(Limits { host_bytes, stored_bytes }));
        let prefixes = Arc::new(Self {
            index,
            let_go: SegQueue::new(),
            groups: Mutex::default(),
            budget: SharedBudget::new(budget, host_bytes),
            host_bytes,
            keeper,
            salt,
            node,
            keeping: Mutex::default(),
            waiting: AtomicUsize::new(0),
        });
        if let Some(keeper) = prefixes.keeper.clone() {
            // A remote store may take its time to say that it is not there.
            let weak = Arc::downgrade(&prefixes);
            let load = move || {
                if let Some(prefixes) = weak.upgrade() {
                    prefixes.load(&keeper);
                }
            };
            if let Err(error) = crate::threads::start("prefixes", load) {
                tracing::warn!("published prefixes of before are not looked for: {error}");
            }
        }
        Ok(prefixes)
    }

    /// An extent that another daemon's sessions have attached to. Of what is published in it nothing is known here: it is there to be read, for
    /// as long as they have it.
    ///
    /// # Errors
    /// A file that is none, or no room for it.
    pub(crate) fn adopt(&self, file: OwnedFd) -> Result<Arc<SharedExtent>, MemoryError> {
        SharedExtent::adopt(file, &self.budget)
    }

    fn index(&self) -> MutexGuard<'_, PrefixIndex<Arc<Block>>> {
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(handle) = self.let_go.pop() {
            if let Err(error) = index.detach(handle) {
                tracing::warn!("a prefix was let go of that nobody had: {error}");
            }
        }
        index
    }

    fn group(&self, scope: Scope, page_bytes: usize) -> Arc<SharedPages> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        // Those of page sizes that nobody has any more.
        groups.retain(|_, group| Arc::strong_count(group) > 1 || !group.is_empty());
        let group = groups
            .entry((scope, page_bytes))
            .or_insert_with(|| SharedPages::new(Arc::clone(&self.budget), page_bytes));
        Arc::clone(group)
    }

    /// Takes a page. If there is no extent for it, what nobody uses goes, the oldest first and whoever published it, until one has come free;
    /// nothing goes where none could.
    fn take(&self, group: &Arc<SharedPages>) -> Result<SharedPage, PrefixFailure> {
        let mut some_could = false;
        loop {
            let (wanted_bytes, free_bytes) = match group.take() {
                Ok(page) => return Ok(page),
                Err(MemoryError::Budget { wanted, free }) => (wanted, free),
                Err(error) => return Err(error.into()),
            };
            some_could = some_could || self.room_could_come_free(group);
            let gone = if some_could { self.index().evict(Tier::Host, 1) } else { Evictions::default() };
            if gone.payloads.is_empty() {
                return Err(PrefixFailure::Full { wanted_bytes, free_bytes });
            }
            self.give_back(gone);
        }
    }

    /// Whether blocks that nobody uses have a page of this group's, or all that is used of an extent.
    fn room_could_come_free(&self, group: &Arc<SharedPages>) -> bool {
        let index = self.index();
        let mut pages: HashMap<*const SharedExtent, (usize, usize)> = HashMap::new();
        for block in index.unused() {
            // Of one that is being written its writer has all pages, too.
            if Arc::strong_count(block) > 1 {
                continue;
            }
            for page in block.pages() {
                if page.is_of(group) {
                    return true;
                }
                let extent = page.extent();
                pages.entry(Arc::as_ptr(extent)).or_insert((0, Arc::strong_count(extent))).0 += 1;
            }
        }
        pages.values().any(|(unused, holders)| unused >= holders)
    }

    fn root(&self, key: &PrefixKey, scope: Scope) -> BlockHash {
        match scope {
            // What is for everybody is the same on every node.
            Scope::Shared => key.root(scope, &[]),
            Scope::Uid(_) => key.root(scope, &self.salt),
        }
    }

    /// Finds out what of these tokens is new, and makes room for it.
    ///
    /// # Errors
    /// No room.
    pub fn draft(
        self: &Arc<Self>,
        key: &PrefixKey,
        scope: Scope,
        tokens: &[u32],
    ) -> Result<Draft, PrefixFailure> {
        let root = self.root(key, scope);
        let hashes = chain(root, tokens, key.model.page_rows as usize);
        let (known, held) = self.hold(root, &hashes)?;
        let (heads, page_bytes) = (key.model.heads().unwrap_or(0), key.model.page_bytes().unwrap_or(0));
        let block_bytes = (heads * page_bytes) as u64;
        let group = self.group(scope, page_bytes);
        let new = hashes.len() - known;
        let wanted = new as u64 * block_bytes;
        let (extents, most) = ((new * heads).div_ceil(group.per_extent()), self.budget.most());
        // Nobody gives way to what will not fit.
        if wanted > self.host_bytes {
            return Err(PrefixFailure::Full { wanted_bytes: wanted, free_bytes: self.host_bytes });
        }
        if extents > most {
            let bytes = |extents: usize| extents as u64 * EXTENT_BYTES as u64;
            return Err(PrefixFailure::Full { wanted_bytes: bytes(extents), free_bytes: bytes(most) });
        }
        let gone = {
            let mut index = self.index();
            let over = (index.bytes(Tier::Host) + wanted).saturating_sub(self.host_bytes);
            index.evict(Tier::Host, over)
        };
        self.give_back(gone);
        let block = || {
            (0..heads)
                .map(|_| self.take(&group))
                .collect::<Result<Vec<_>, _>>()
                .map(|pages| Arc::new(Block(pages)))
        };
        let blocks = (known..hashes.len()).map(|_| block()).collect::<Result<Vec<_>, _>>()?;
        let shared = scope == Scope::Shared;
        Ok(Draft { root, hashes, known, block_bytes, model: key.model.clone(), shared, blocks, held })
    }

    /// How many leading blocks of a chain are known, and what keeps them: what is published now must not push out what it continues.
    fn hold(
        self: &Arc<Self>,
        root: BlockHash,
        hashes: &[BlockHash],
    ) -> Result<(usize, Option<Attachment>), PrefixFailure> {
        let mut index = self.index();
        let known = index.known(root, hashes);
        if known == 0 {
            return Ok((0, None));
        }
        // Nothing is new in it: this only finds them.
        let handle = index.publish(root, &hashes[..known], Vec::new(), 0)?.handle;
        index.attach(handle)?;
        Ok((known, Some(Attachment { prefixes: Arc::clone(self), handle, blocks: Vec::new() })))
    }

    /// Publishes blocks that have been filled. How many blocks can be attached to now, and how many of them had been there before.
    ///
    /// # Errors
    /// No room beside what is in use.
    pub fn publish(self: &Arc<Self>, draft: Draft, uid: u32) -> Result<(usize, usize), PrefixFailure> {
        let Draft { root, hashes, known, block_bytes, model, shared, blocks, held } = draft;
        let all = hashes.len();
        if hashes.is_empty() {
            return Ok((0, 0));
        }
        let published = {
            let mut index = self.index();
            // Others may have published the same meanwhile, or what was known has gone.
            let now = index.known(root, &hashes);
            if now < known {
                return Err(PrefixError::Gone.into());
            }
            let places = blocks[now - known..].iter().map(|block| Place::Host(Arc::clone(block))).collect();
            index.publish(root, &hashes, places, block_bytes)?
        };
        drop(held);
        self.give_back(published.evicted);
        let first = published.known;
        if let (Some(keeper), true) = (self.keeper.clone(), first < all) {
            let (prefixes, blocks) = (Arc::clone(self), blocks[first - known..].to_vec());
            let task = Task { root, hashes, first, blocks, model, shared, uid };
            let work = move || {
                // One at a time: whoever publishes faster than the disk writes keeps less.
                let turn = prefixes.keeping.lock().unwrap_or_else(PoisonError::into_inner);
                prefixes.keep(&keeper, &task);
                drop(turn);
                prefixes.waiting.fetch_sub(1, Ordering::Relaxed);
            };
            if self.waiting.fetch_add(1, Ordering::Relaxed) >= WAITING_MAX {
                self.waiting.fetch_sub(1, Ordering::Relaxed);
                tracing::warn!(
                    "a published prefix is on the host only: {WAITING_MAX} others wait to be written"
                );
            } else if let Err(error) = crate::threads::start("prefix", work) {
                self.waiting.fetch_sub(1, Ordering::Relaxed);
                tracing::warn!("a published prefix is on the host only: {error}");
            }
        }
        Ok((all, first))
    }

    /// Writes blocks to an image, so that they need not stay on the host.
    fn keep(&self, keeper: &Keeper, task: &Task) {
        let Task { root, hashes, first, blocks, model, shared, uid } = task;
        let (first, uid) = (*first, *uid);
        let Some(last) = hashes.last() else { return };
        let written = || -> Result<Arc<ImageId>, StoreError> {
            let id: ImageId = image_of(last, first)?;
            let mut writer = keeper.create(&id, true)?;
            let mut bytes = vec![0; model.page_bytes().unwrap_or(0)];
            for head in 0..model.heads().unwrap_or(0) {
                for block in blocks {
                    if let Some(page) = block.pages().get(head) {
                        page.read(&mut bytes).map_err(|error| StoreError::Io {
                            doing: "read pages for",
                            path: id.as_str().into(),
                            source: std::io::Error::other(error),
                        })?;
                        writer.page(&bytes)?;
                    }
                }
            }
            let hashes = hashes.iter().map(|hash| *hash.as_bytes()).collect();
            let about = Blocks { root: *root.as_bytes(), hashes, first };
            let about = postcard::to_stdvec(&about)
                .unwrap_or_else(|error| unreachable!("plain data always serialises: {error}"));
            writer.blob(BLOCKS, &about)?;
            let rows = blocks.len() as u32 * model.page_rows;
            writer.commit(Manifest {
                kind: ImageKind::Prefix,
                uid,
                created_unix: crate::control::now_unix(),
                method: String::new(),
                seed: 0,
                lens: vec![rows; model.layers as usize],
                tokens: rows,
                pages: PageTable::full(vec![blocks.len() as u32; model.heads().unwrap_or(0)]),
                blobs: Vec::new(),
                label: self.node.clone(),
                model: model.clone(),
            })?;
            Ok(Arc::new(id))
        };
        match written() {
            Ok(image) => {
                for hash in &hashes[first..] {
                    // It may have gone from the host, and from the index, meanwhile.
                    // Nor may there be room for it.
                    let gone = self.index().set_stored(hash, Arc::clone(&image));
                    if let Ok(gone) = gone {
                        self.give_back(gone);
                    }
                }
                if !self.index().has_image(&image) {
                    self.erase(keeper, &image);
                } else if *shared {
                    // Of a user's own nobody else knows the salt.
                    // Another one of that name has the same blocks, whoever made it.
                    keeper.kept((*image).clone(), false);
                }
            }
            Err(error) => tracing::warn!("a published prefix is on the host only: {error}"),
        }
    }

    /// Erases images in which nothing lies any more. Pages go back as they are dropped.
    fn give_back(&self, gone: Evictions<Arc<Block>>) {
        let Some(keeper) = &self.keeper else { return };
        for image in gone.images {
            self.erase(keeper, &image);
        }
    }

    /// Erases an image in which nothing lies any more; in the remote store only if it is of our own making.
    fn erase(&self, keeper: &Keeper, image: &ImageId) {
        // First what may take its time.
        let others = keeper.is_others(image, &self.node);
        // It may have been written anew since the index let go of it.
        if self.index().has_image(image) {
            return;
        }
        let erased = match others {
            Ok(false) => keeper.remove(image),
            Ok(true) => keeper.remove_here(image),
            Err(error) => keeper.remove_here(image).and(Err(error)),
        };
        match erased {
            Ok(()) | Err(StoreError::NotFound { .. }) => {}
            Err(error) => tracing::warn!("image {image} of a prefix that is gone stays: {error}"),
        }
    }

    /// The longest published prefix of these tokens, of this user's or everybody's, on the host; `None` if there is none.
    ///
    /// # Errors
    /// No room, or an image that cannot be read: the prefix is forgotten then.
    pub fn attach(
        self: &Arc<Self>,
        key: &PrefixKey,
        uid: u32,
        tokens: &[u32],
    ) -> Result<Option<Arc<Attachment>>, PrefixFailure> {
        let mut best: Option<(Scope, Handle, usize)> = None;
        for scope in [Scope::Uid(uid), Scope::Shared] {
            if matches!(scope, Scope::Uid(uid) if NOBODY.contains(&uid)) {
                continue;
            }
            let root = self.root(key, scope);
            let hashes = chain(root, tokens, key.model.page_rows as usize);
            if hashes.is_empty() {
                return Ok(None);
            }
            let mut index = self.index();
            if let Some(found) = index.longest(root, &hashes)
                && best.is_none_or(|(_, _, blocks)| blocks < found.blocks)
            {
                index.attach(found.handle)?;
                if let Some((_, handle, _)) = best.replace((scope, found.handle, found.blocks)) {
                    index.detach(handle)?;
                }
            }
        }
        let Some((scope, handle, _)) = best else { return Ok(None) };
        // From here on, dropping lets go of it.
        let mut attachment = Attachment { prefixes: Arc::clone(self), handle, blocks: Vec::new() };
        let path: Vec<(BlockHash, Place<Arc<Block>>)> =
            self.index().path(handle)?.into_iter().map(|(hash, place)| (hash, place.clone())).collect();
        let mut images = Images { keeper: self.keeper.as_deref(), open: HashMap::new() };
        for (hash, place) in path {
            let block = match place.host() {
                Some(block) => Arc::clone(block),
                None => match self.bring(&mut images, scope, key, &hash, &place) {
                    Ok(block) => block,
                    Err(error) => {
                        tracing::warn!("a published prefix cannot be brought back: {error}");
                        drop(attachment);
                        // What only cannot be had now is not forgotten for that.
                        let gone = matches!(
                            error,
                            PrefixFailure::Store(StoreError::Damaged { .. } | StoreError::NotFound { .. })
                                | PrefixFailure::Index(PrefixError::Gone)
                        );
                        if gone {
                            self.forget(&hash);
                        }
                        return Err(error);
                    }
                },
            };
            attachment.blocks.push(block);
        }
        Ok(Some(Arc::new(attachment)))
    }

    /// Reads a block's rows out of its image.
    fn bring(
        &self,
        images: &mut Images<'_>,
        scope: Scope,
        key: &PrefixKey,
        hash: &BlockHash,
        place: &Place<Arc<Block>>,
    ) -> Result<Arc<Block>, PrefixFailure> {
        let (heads, page_bytes) = (key.model.heads().unwrap_or(0), key.model.page_bytes().unwrap_or(0));
        let group = self.group(scope, page_bytes);
        let pages = (0..heads).map(|_| self.take(&group)).collect::<Result<Vec<_>, _>>()?;
        let (Some(image), Some(keeper)) = (place.image(), images.keeper) else {
            return Err(PrefixError::Gone.into());
        };
        let (reader, numbers) = images.of(keeper, image, &key.model)?;
        let number = *numbers.get(hash).ok_or(PrefixError::Gone)?;
        let count = numbers.len();
        let mut bytes = vec![0; page_bytes];
        for (head, page) in pages.iter().enumerate() {
            reader.page(head * count + number, &mut bytes)?;
            page.write(&bytes)?;
        }
        let block = Arc::new(Block(pages));
        let gone = self.index().set_host(hash, Arc::clone(&block))?;
        self.give_back(gone);
        Ok(block)
    }

    fn forget(&self, hash: &BlockHash) {
        let gone = self.index().forget(hash);
        match gone {
            Ok(gone) => self.give_back(gone),
            Err(error) => tracing::debug!("a damaged prefix stays known: {error}"),
        }
    }
}

/// Blocks that are to be written.
struct Task {
    root: BlockHash,
    hashes: Vec<BlockHash>,
    first: usize,
    blocks: Vec<Arc<Block>>,
    model: ModelKey,
    shared: bool,
    uid: u32,
}

/// A salt that nobody else knows.
#[must_use]
pub fn fresh_salt() -> Vec<u8> {
    use std::hash::{BuildHasher, Hasher};
    use std::io::Read;
    let mut salt = vec![0; 32];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut salt));
    if read.is_ok() {
        return salt;
    }
    // The standard library's hasher keys are random too.
    let random = |_| std::collections::hash_map::RandomState::new().build_hasher().finish().to_le_bytes();
    (0..4).flat_map(random).collect()
}
