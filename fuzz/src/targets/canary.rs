//! A target with a bug that a working fuzzer finds at once. If it is not found, nothing that is not found means anything.

/// Panics on a word that none of its seeds has.
///
/// # Panics
/// If the input begins with `KVO`.
pub fn run(bytes: &[u8]) {
    assert!(!bytes.starts_with(b"KVO"), "the canary was found");
}

/// Next to the word.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    vec![b"KVN".to_vec(), b"OK".to_vec(), Vec::new()]
}
