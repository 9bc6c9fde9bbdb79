//! A config server over its own port, as people, programs and parts see it.

mod access;
mod console;
mod membership;
mod state;
mod support;
