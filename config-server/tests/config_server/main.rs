//! A config server over its own port, as people, programs and parts see it.

mod access;
mod alerts;
mod console;
mod dns;
mod document;
mod failover;
mod home;
mod membership;
mod parts;
mod plans;
mod proofs;
mod protection;
mod several;
mod state;
mod support;
