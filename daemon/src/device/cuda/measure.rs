//! Measures the transfer engines.
