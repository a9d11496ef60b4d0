//! Checked wrappers over the CUDA driver.
