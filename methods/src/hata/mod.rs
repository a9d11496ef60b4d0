//! `hata`: rows by the Hamming distance of learnt codes (HATA, Findings of ACL 2025, arXiv 2506.02572).

pub mod train;
