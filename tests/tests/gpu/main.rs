//! CUDA, from its wrappers to engines that attend on a device. The GPU is softcuda.

mod driver;
mod engine;
mod graph;
mod processes;
mod service;
mod softcuda;
mod transfers;
mod trouble;
