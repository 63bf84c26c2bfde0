//! The views, a file each; see [`crate::view`].

pub mod curves;
pub mod elsewhere;
pub mod form;
pub mod gauges;
pub mod heat;
pub mod highlight;
pub mod lanes;
pub mod memory;
pub mod requests;
pub mod routing;
pub mod scene;
pub mod timeline;
pub mod timeline_paint;
pub mod what_if;
pub mod world;
