//! What a transfer costs on each engine.
