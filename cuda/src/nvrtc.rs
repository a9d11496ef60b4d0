//! NVRTC: finds the run-time compiler where people have it, and compiles one source for one card.
//!
//! The library is optional. Its few functions are declared here, because it must be loaded from a path (pip's folders
//! are on no loader path) and may be of any version.

use std::collections::HashSet;
use std::env;
use std::ffi::{CStr, CString, c_char, c_int};
use std::fmt;
use std::path::{Path, PathBuf};

use libloading::Library;

use crate::calls::load_library;

/// Names by which the loader, or a folder, may have it. Twelve comes first: what it compiles every driver we serve
/// can load, which a newer one does not promise.
const LIBRARY_NAMES: [&str; 3] = ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"];

/// Names one library file, or a folder that has it; nothing else is tried then.
const VARIABLE: &str = "KVOYANT_NVRTC";

/// There is no compiler: kernels cannot be made here, and copy engines do all the work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no NVRTC on this machine: install it (pip install nvidia-cuda-nvrtc-cu12, or the CUDA toolkit) or name it in \
     KVOYANT_NVRTC (tried {})",
    tried.join(", ")
)]
pub struct NvrtcUnavailable {
    /// What was tried, with what went wrong where a file was there.
    pub tried: Vec<String>,
}

/// A source that did not compile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kernel source {name} does not compile for sm_{}{}: {reason}\n{log}", arch.0, arch.1)]
pub struct CompileError {
    /// The source.
    pub name: String,
    /// The card's compute capability.
    pub arch: (u32, u32),
    /// The compiler's answer in a word.
    pub reason: String,
    /// The compiler's log.
    pub log: String,
}

/// `nvrtcProgram`.
type Program = *mut std::ffi::c_void;

macro_rules! nvrtc_calls {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $answer:ty;)*) => {
        #[allow(non_snake_case)]
        struct Calls {
            $($name: unsafe extern "C" fn($($argument: $kind),*) -> $answer,)*
            _library: Library,
        }

        impl Calls {
            /// # Safety
            /// `library` is NVRTC: its functions have the signatures of `nvrtc.h`.
            unsafe fn resolve(library: Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $($name: {
                        // SAFETY: the caller vouches for the signature; the library is kept beside the pointer.
                        let found = unsafe {
                            library.get::<unsafe extern "C" fn($($argument: $kind),*) -> $answer>(stringify!($name))
                        };
                        match found {
                            Ok(function) => *function,
                            Err(_) => return Err(stringify!($name)),
                        }
                    },)*
                    _library: library,
                })
            }
        }
    };
}

nvrtc_calls! {
    nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int;
    nvrtcGetErrorString(result: c_int) -> *const c_char;
    nvrtcCreateProgram(
        program: *mut Program, source: *const c_char, name: *const c_char,
        count: c_int, headers: *const *const c_char, header_names: *const *const c_char
    ) -> c_int;
    nvrtcDestroyProgram(program: *mut Program) -> c_int;
    nvrtcCompileProgram(program: Program, count: c_int, options: *const *const c_char) -> c_int;
    nvrtcGetProgramLogSize(program: Program, bytes: *mut usize) -> c_int;
    nvrtcGetProgramLog(program: Program, log: *mut c_char) -> c_int;
    nvrtcGetCUBINSize(program: Program, bytes: *mut usize) -> c_int;
    nvrtcGetCUBIN(program: Program, cubin: *mut c_char) -> c_int;
}

/// The run-time compiler.
pub struct Compiler {
    calls: Calls,
    version: (u32, u32),
    place: String,
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiler")
            .field("version", &self.version)
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl Compiler {
    /// Finds the compiler: in `KVOYANT_NVRTC` alone if that is set; else on the loader's path, in `CUDA_HOME` and
    /// `CUDA_PATH`, in `/usr/local/cuda`, and in pip's folders.
    pub fn find() -> Result<Self, NvrtcUnavailable> {
        let mut tried = Vec::new();
        for place in places(|name| env::var_os(name).map(PathBuf::from)) {
            match Self::load(&place) {
                Ok(compiler) => return Ok(compiler),
                Err(reason) => tried.push(format!("{} ({reason})", place.display())),
            }
        }
        Err(NvrtcUnavailable { tried })
    }

    fn load(place: &Path) -> Result<Self, String> {
        // SAFETY: NVRTC's initialisers are made to be run by whoever loads it.
        let library = unsafe { load_library(place) }
            .map_err(|reason| if reason.is_empty() { "not there".to_owned() } else { reason })?;
        // SAFETY: a library of this name is NVRTC, with the signatures of nvrtc.h.
        let calls = unsafe { Calls::resolve(library) }.map_err(|name| format!("it lacks {name}"))?;
        let (mut major, mut minor): (c_int, c_int) = (0, 0);
        // SAFETY: both are ours to be written.
        let answer = unsafe { (calls.nvrtcVersion)(&raw mut major, &raw mut minor) };
        if answer != 0 {
            return Err(format!("it does not say its version ({answer})"));
        }
        let version = (u32::try_from(major).unwrap_or(0), u32::try_from(minor).unwrap_or(0));
        Ok(Self { calls, version, place: place.display().to_string() })
    }

    /// Its version, major and minor.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Where it was found.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Compiles `source` to a cubin for a card of compute capability `arch`. `name` stands in the compiler's messages.
    pub fn compile(&self, source: &str, name: &str, arch: (u32, u32)) -> Result<Vec<u8>, CompileError> {
        let failed = |reason: String, log: String| CompileError { name: name.to_owned(), arch, reason, log };
        let unfit = |_| failed("the text has a NUL in it".to_owned(), String::new());
        let c_source = CString::new(source).map_err(unfit)?;
        let c_name = CString::new(format!("{name}.cu")).map_err(unfit)?;
        let mut raw: Program = std::ptr::null_mut();
        // SAFETY: both strings end in NUL and outlive the call, and no headers are given.
        let answer = unsafe {
            (self.calls.nvrtcCreateProgram)(
                &raw mut raw,
                c_source.as_ptr(),
                c_name.as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        if answer != 0 {
            return Err(failed(self.reason(answer), String::new()));
        }
        let program = Guard { calls: &self.calls, raw };

        // The same arithmetic as the twins on the host: contraction on, nothing else bent.
        let options = [
            format!("--gpu-architecture=sm_{}{}", arch.0, arch.1),
            "--std=c++17".to_owned(),
            "--fmad=true".to_owned(),
            "--prec-div=true".to_owned(),
            "--prec-sqrt=true".to_owned(),
            "--ftz=false".to_owned(),
        ];
        let options: Vec<CString> = options.into_iter().filter_map(|text| CString::new(text).ok()).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|text| text.as_ptr()).collect();
        // SAFETY: the program lives, and there are as many strings as is said.
        let answer = unsafe {
            (self.calls.nvrtcCompileProgram)(program.raw, pointers.len() as c_int, pointers.as_ptr())
        };
        if answer != 0 {
            return Err(failed(self.reason(answer), program.log()));
        }
        program.cubin().map_err(|answer| failed(self.reason(answer), program.log()))
    }

    fn reason(&self, answer: c_int) -> String {
        // SAFETY: the call takes any number and gives a constant string.
        let text = unsafe { (self.calls.nvrtcGetErrorString)(answer) };
        if text.is_null() {
            return format!("NVRTC error {answer}");
        }
        // SAFETY: NVRTC's strings are NUL-terminated constants.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

/// A program that is destroyed when it goes.
struct Guard<'a> {
    calls: &'a Calls,
    raw: Program,
}

impl Guard<'_> {
    /// The compiler's messages; empty if it has none.
    fn log(&self) -> String {
        let bytes =
            self.bytes(self.calls.nvrtcGetProgramLogSize, self.calls.nvrtcGetProgramLog).unwrap_or_default();
        String::from_utf8_lossy(&bytes).trim_end_matches('\0').trim_end().to_owned()
    }

    fn cubin(&self) -> Result<Vec<u8>, c_int> {
        self.bytes(self.calls.nvrtcGetCUBINSize, self.calls.nvrtcGetCUBIN)
    }

    /// What the second call writes, as long as the first one says.
    fn bytes(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        write: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, c_int> {
        let mut len = 0usize;
        // SAFETY: the program lives; `len` is ours to be written.
        let answer = unsafe { size(self.raw, &raw mut len) };
        if answer != 0 {
            return Err(answer);
        }
        let mut bytes = vec![0u8; len];
        // SAFETY: the buffer is as long as the library said.
        let answer = unsafe { write(self.raw, bytes.as_mut_ptr().cast()) };
        if answer == 0 { Ok(bytes) } else { Err(answer) }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // SAFETY: created once and destroyed once.
        let answer = unsafe { (self.calls.nvrtcDestroyProgram)(&raw mut self.raw) };
        if answer != 0 {
            tracing::warn!(answer, "an NVRTC program could not be destroyed");
        }
    }
}

/// Every path to try, in order; a bare name asks the loader.
fn places(variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(named) = variable(VARIABLE).filter(|path| !path.as_os_str().is_empty()) {
        return if named.is_dir() { in_folder(&named) } else { vec![named] };
    }
    let mut places: Vec<PathBuf> = LIBRARY_NAMES.iter().map(PathBuf::from).collect();
    let toolkits =
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(&variable).chain(["/usr/local/cuda".into()]);
    for toolkit in toolkits {
        places.extend(in_folder(&toolkit.join("lib64")));
        places.extend(in_folder(&toolkit.join("lib")));
    }
    if let Some(conda) = variable("CONDA_PREFIX") {
        places.extend(in_folder(&conda.join("lib")));
    }
    let roots = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .into_iter()
        .filter_map(&variable)
        .chain(variable("HOME").map(|home| home.join(".local")))
        .chain(["/usr/local", "/usr"].map(PathBuf::from));
    for root in roots {
        places.extend(pip_folders(&root).iter().flat_map(|folder| in_folder(folder)));
    }
    let mut seen = HashSet::new();
    places.retain(|place| seen.insert(place.clone()));
    places
}

/// The library's files in one folder, of the names that are there.
fn in_folder(folder: &Path) -> Vec<PathBuf> {
    LIBRARY_NAMES.iter().map(|name| folder.join(name)).filter(|path| path.exists()).collect()
}

/// The folders of NVIDIA's wheels under a Python's root: `nvidia/cuda_nvrtc/lib`, and `nvidia/cu13/lib` since 13.
fn pip_folders(root: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for lib in ["lib", "lib64"] {
        for python in children(&root.join(lib)) {
            let name = python.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !name.starts_with("python") {
                continue;
            }
            for packages in ["site-packages", "dist-packages"] {
                folders.extend(
                    children(&python.join(packages).join("nvidia")).iter().map(|wheel| wheel.join("lib")),
                );
            }
        }
    }
    folders.retain(|folder| !in_folder(folder).is_empty());
    folders
}

/// What a folder has, in the order of names; nothing if it cannot be read.
fn children(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, b"").unwrap();
    }

    #[test]
    fn pips_folders_are_found_in_every_kind_of_environment() {
        let root = tempfile::tempdir().unwrap();
        let twelve = root.path().join("lib/python3.11/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12");
        let thirteen = root.path().join("lib/python3.12/dist-packages/nvidia/cu13/lib/libnvrtc.so.13");
        touch(&twelve);
        touch(&thirteen);
        touch(&root.path().join("lib/python3.12/dist-packages/nvidia/cublas/lib/libcublas.so.12"));
        let found: Vec<PathBuf> =
            pip_folders(root.path()).iter().flat_map(|folder| in_folder(folder)).collect();
        assert_eq!(found, [twelve.clone(), thirteen.clone()]);

        let in_venv = places(|name| (name == "VIRTUAL_ENV").then(|| root.path().to_owned()));
        let position = |path: &Path| in_venv.iter().position(|place| place == path);
        assert!(position(Path::new("libnvrtc.so.12")).is_some(), "the loader is asked too");
        assert!(position(Path::new("libnvrtc.so.12")) < position(&twelve), "and is asked first");
        assert!(position(&thirteen).is_some());
    }

    #[test]
    fn the_variable_names_a_file_or_a_folder_and_nothing_else_is_tried() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("libnvrtc.so.12");
        touch(&file);
        let with = |path: PathBuf| places(move |name| (name == VARIABLE).then(|| path.clone()));
        assert_eq!(with(folder.path().to_owned()), std::slice::from_ref(&file));
        assert_eq!(with(file.clone()), [file]);
        assert_eq!(with("/nowhere/libnvrtc.so".into()), [PathBuf::from("/nowhere/libnvrtc.so")]);
    }

    #[test]
    fn a_file_that_is_no_library_is_an_answer_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("libnvrtc.so.12");
        std::fs::write(&file, b"not a library").unwrap();
        let reason = Compiler::load(&file).unwrap_err();
        assert!(reason.contains("libnvrtc.so.12"), "the loader's own words: {reason:?}");
        assert_eq!(Compiler::load(Path::new("/nowhere/libnvrtc.so")).unwrap_err(), "not there");
        let text = NvrtcUnavailable { tried: vec![format!("{} ({reason})", file.display())] }.to_string();
        assert!(text.contains("pip install nvidia-cuda-nvrtc-cu12"), "{text}");
        assert!(text.contains("libnvrtc.so.12"), "{text}");
    }
}
