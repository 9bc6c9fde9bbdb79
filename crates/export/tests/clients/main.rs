//! The clients that people use, against exports of real views.

mod files;
mod promoted;
mod reading;
mod strangers;
mod support;
mod tls;
mod writing;
