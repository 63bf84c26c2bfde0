//! stub
pub mod mmap;
