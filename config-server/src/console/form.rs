//! What a form sent.

use axum::extract::{FromRequest, Request};
use control::fleet::ProblemCode;

use crate::fault::{Answer, Fault, fault, invalid};

/// The fields of a form, in order; a name may be there several times.
pub(super) struct Form(Vec<(String, String)>);

impl<S: Send + Sync> FromRequest<S> for Form {
    type Rejection = Fault;
    async fn from_request(request: Request, state: &S) -> Result<Form, Fault> {
        match axum::extract::Form::<Vec<(String, String)>>::from_request(request, state).await {
            Ok(form) => Ok(Form(form.0)),
            Err(error) => Err(fault(
                ProblemCode::BadRequest,
                format!("Read the form: {}", error.body_text()),
                "Go back and send it again.",
            )),
        }
    }
}

impl Form {
    /// The first of this name; empty when there is none.
    pub(super) fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(own, _)| own == name).map_or("", |(_, value)| value.trim())
    }

    /// As it was typed: of passwords every space counts.
    pub(super) fn verbatim(&self, name: &str) -> &str {
        self.0.iter().find(|(own, _)| own == name).map_or("", |(_, value)| value)
    }

    /// All of this name that are not empty.
    pub(super) fn all(&self, name: &str) -> Vec<&str> {
        let values = self.0.iter().filter(|(own, _)| own == name).map(|(_, value)| value.trim());
        values.filter(|value| !value.is_empty()).collect()
    }

    /// Whether a box is ticked.
    pub(super) fn ticked(&self, name: &str) -> bool {
        !self.get(name).is_empty()
    }

    /// The session's second secret, as the page has it.
    pub(super) fn csrf(&self) -> &str {
        self.get("csrf")
    }

    /// A value that must be there.
    pub(super) fn value<T: std::str::FromStr>(&self, name: &str) -> Answer<T>
    where
        T::Err: std::fmt::Display,
    {
        self.get(name).parse().map_err(|error| invalid(format!("{name}: {error}")))
    }

    /// A value that may be left out.
    pub(super) fn optional<T: std::str::FromStr>(&self, name: &str) -> Answer<Option<T>>
    where
        T::Err: std::fmt::Display,
    {
        if self.get(name).is_empty() { Ok(None) } else { self.value(name).map(Some) }
    }
}
