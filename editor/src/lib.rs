//! The window: what every expert and every stream does, live, from snapshots of a run, a trace or a plan. It knows no world.
//!
//! Data goes one way: a [`source::Source`] gives snapshots, a [`history::History`] keeps the newest, and views draw what is
//! under the one cursor that they share. What a scene means, and how a plan is made, is the [`workbench::Workbench`]'s, which
//! the program gives: so the editor has no word of models but for what it shows.

pub mod app;
pub mod axes;
pub mod background;
pub mod desk;
pub mod dialog;
pub mod document;
pub mod help;
pub mod history;
pub mod loads;
pub mod overlap;
pub mod paint;
pub mod source;
pub mod theme;
pub mod units;
pub mod view;
pub mod views;
pub mod window;
pub mod workbench;
