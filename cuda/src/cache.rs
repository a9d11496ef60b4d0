//! Compiled kernels on disk: found again by source, card and compiler, checked before they are loaded, and compiled
//! anew when anything is wrong with them.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use kvoyant_kernels::cuda::Source;

use crate::context::Context;
use crate::error::CudaError;
use crate::module::Module;
use crate::nvrtc::{CompileError, Compiler, NvrtcUnavailable};

/// Why a kernel cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No compiler, and nothing in the cache that fits.
    #[error("kernels need a compiler, and nothing in the cache fits: {0}")]
    NoCompiler(#[from] NvrtcUnavailable),
    /// The source does not compile for this card.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// The driver does not take the image.
    #[error("kernel {name} does not load: {error}")]
    Load {
        /// The source.
        name: &'static str,
        /// The driver's answer.
        error: CudaError,
    },
}

/// First bytes of a file of ours; the digit is the version of the layout.
const MAGIC: &[u8; 8] = b"KVCUBIN1";
const DIGEST_BYTES: usize = 32;
/// No kernel of ours comes near this; what is larger is not ours.
const IMAGE_BYTES_MAX: u64 = 64 << 20;

/// A folder of compiled kernels. One folder may serve several processes and cards at once.
#[derive(Debug)]
pub struct KernelCache {
    folder: PathBuf,
    compiler: OnceLock<Result<Compiler, NvrtcUnavailable>>,
}

impl KernelCache {
    /// A cache in `folder`, which is made when it is first written to, for its owner alone: what lies in it runs on
    /// the device.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), compiler: OnceLock::new() }
    }

    /// The compiler, looked for once.
    pub fn compiler(&self) -> Result<&Compiler, NvrtcUnavailable> {
        self.compiler
            .get_or_init(|| {
                Compiler::find().inspect(|compiler| {
                    let (major, minor) = compiler.version();
                    tracing::info!(place = compiler.place(), version = %format_args!("{major}.{minor}"), "NVRTC found");
                })
            })
            .as_ref()
            .map_err(Clone::clone)
    }

    /// The kernels of `source`, loaded into `context`; compiled if the cache has them not, or not in order.
    pub fn module(&self, context: &Context, source: &Source) -> Result<Module, KernelError> {
        let image = self.cubin(source, context.info().compute)?;
        context.load_module(&image).map_err(|error| KernelError::Load { name: source.name(), error })
    }

    /// The image of `source` for cards of compute capability `arch`: needs no card and no driver.
    ///
    /// Without a compiler an image that any other compiler made will do, so that a folder can be filled on one machine
    /// and used on another.
    pub fn cubin(&self, source: &Source, arch: (u32, u32)) -> Result<Vec<u8>, KernelError> {
        let stem = format!("{}-{}-sm_{}{}-nvrtc", source.name(), source.hash(), arch.0, arch.1);
        match self.compiler() {
            Ok(compiler) => {
                let (major, minor) = compiler.version();
                let compile = || compiler.compile(&source.compile_text(), source.name(), arch);
                Ok(self.image(&format!("{stem}{major}.{minor}"), compile)?)
            }
            Err(none) => self.any_image(&stem).ok_or(KernelError::NoCompiler(none)),
        }
    }

    /// A whole image whose key begins with `stem`, the last by name.
    fn any_image(&self, stem: &str) -> Option<Vec<u8>> {
        let names =
            fs::read_dir(&self.folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut keys: Vec<String> = names
            .filter_map(|name| name.strip_suffix(".cubin").map(str::to_owned))
            .filter(|key| key.starts_with(stem))
            .collect();
        keys.sort();
        keys.iter().rev().find_map(|key| read(&self.path(key), key).ok().flatten())
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.cubin"))
    }

    /// The image of this key: from the disk if it is there and whole, else what `compile` makes, kept for next time.
    fn image<E>(&self, key: &str, compile: impl FnOnce() -> Result<Vec<u8>, E>) -> Result<Vec<u8>, E> {
        let path = self.path(key);
        match read(&path, key) {
            Ok(Some(image)) => return Ok(image),
            Ok(None) => tracing::debug!(key, "not in the kernel cache"),
            Err(error) => tracing::warn!(path = %path.display(), %error, "a cached kernel is compiled anew"),
        }
        let image = compile()?;
        // A cache that cannot be written costs time at the next start, and nothing else.
        if let Err(error) = self.write(&path, key, &image) {
            tracing::warn!(path = %path.display(), %error, "a compiled kernel could not be kept");
        }
        Ok(image)
    }

    /// Writes beside the path and renames, so that nobody ever reads half a file.
    fn write(&self, path: &Path, key: &str, image: &[u8]) -> io::Result<()> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let draft = self.folder.join(format!(".{key}.{}.{number}", std::process::id()));
        let written = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft).and_then(
            |mut file| {
                file.write_all(MAGIC)?;
                file.write_all(digest(key, image).as_bytes())?;
                file.write_all(image)?;
                file.sync_all()
            },
        );
        written.and_then(|()| fs::rename(&draft, path)).inspect_err(|_| {
            // What matters is told already; a draft that stays is found by its leading dot.
            let _gone = fs::remove_file(&draft);
        })
    }
}

/// Binds the image to its key, so that a file under another's name is noticed.
fn digest(key: &str, image: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key.as_bytes());
    hasher.update(image);
    hasher.finalize()
}

/// The image in a file of ours; none if there is no file, an error if it is not what was written.
fn read(path: &Path, key: &str) -> io::Result<Option<Vec<u8>>> {
    let bytes = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
        Ok(metadata) if metadata.len() > IMAGE_BYTES_MAX => {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too long to be a kernel"));
        }
        Ok(_) => fs::read(path)?,
    };
    let damaged = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let rest = bytes
        .strip_prefix(MAGIC.as_slice())
        .ok_or_else(|| damaged("it does not begin as a kernel of ours"))?;
    let (sum, image) = rest.split_at_checked(DIGEST_BYTES).ok_or_else(|| damaged("it is cut short"))?;
    if digest(key, image).as_bytes().as_slice() != sum {
        return Err(damaged("its checksum does not match"));
    }
    Ok(Some(image.to_vec()))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;

    use super::*;

    /// Asks for `key` and answers the image and how often the compiler ran for it.
    fn ask(cache: &KernelCache, key: &str, made: &[u8]) -> (Vec<u8>, u32) {
        let runs = Cell::new(0);
        let image = cache
            .image(key, || {
                runs.set(runs.get() + 1);
                Ok::<_, Infallible>(made.to_vec())
            })
            .unwrap();
        (image, runs.get())
    }

    #[test]
    fn a_kernel_is_compiled_once_and_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let cache = KernelCache::new(folder.path().join("new/kernels"));
        assert_eq!(ask(&cache, "gather-sm_90", b"image"), (b"image".to_vec(), 1));
        assert_eq!(ask(&cache, "gather-sm_90", b"other"), (b"image".to_vec(), 0));
        assert_eq!(ask(&cache, "gather-sm_80", b"other"), (b"other".to_vec(), 1), "another card has its own");
        let names: Vec<_> =
            fs::read_dir(&cache.folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "no draft is left: {names:?}");
    }

    #[test]
    fn without_a_compiler_any_whole_image_of_the_same_source_and_card_will_do() {
        let folder = tempfile::tempdir().unwrap();
        let cache = KernelCache::new(folder.path());
        assert_eq!(cache.any_image("gather-77-sm_90-nvrtc"), None, "an empty cache");
        ask(&cache, "gather-77-sm_90-nvrtc12.8", b"older");
        ask(&cache, "gather-77-sm_90-nvrtc12.9", b"newer");
        ask(&cache, "gather-77-sm_80-nvrtc12.9", b"another card's");
        assert_eq!(cache.any_image("gather-77-sm_90-nvrtc"), Some(b"newer".to_vec()));
        fs::write(folder.path().join("gather-77-sm_90-nvrtc12.9.cubin"), b"damaged").unwrap();
        assert_eq!(cache.any_image("gather-77-sm_90-nvrtc"), Some(b"older".to_vec()));
        assert_eq!(cache.any_image("gather-78-sm_90-nvrtc"), None, "another source");
    }

    #[test]
    fn a_damaged_truncated_or_foreign_file_is_compiled_anew_and_mended() {
        let folder = tempfile::tempdir().unwrap();
        let cache = KernelCache::new(folder.path());
        let path = folder.path().join("gather.cubin");
        ask(&cache, "gather", b"image");
        let whole = fs::read(&path).unwrap();
        ask(&cache, "select", b"of another kernel");
        let foreign = fs::read(folder.path().join("select.cubin")).unwrap();

        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        let bad = [
            flipped,
            whole[..whole.len() - 1].to_vec(),
            whole[..20].to_vec(),
            vec![],
            foreign,
            vec![b'x'; 4096],
        ];
        for (case, bytes) in bad.into_iter().enumerate() {
            fs::write(&path, bytes).unwrap();
            assert_eq!(ask(&cache, "gather", b"image"), (b"image".to_vec(), 1), "case {case}");
            assert_eq!(fs::read(&path).unwrap(), whole, "case {case} is mended on disk");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_only_the_next_compilation() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a-file");
        fs::write(&file, b"").unwrap();
        let cache = KernelCache::new(file.join("kernels"));
        assert_eq!(ask(&cache, "gather", b"image"), (b"image".to_vec(), 1));
        assert_eq!(ask(&cache, "gather", b"image"), (b"image".to_vec(), 1));
    }
}
