//! One act of the API: its path, who may do it, what it takes and gives, and what does it. The router and the OpenAPI
//! document are both made of the one list of acts, so that they cannot disagree.

use std::collections::BTreeMap;

use axum::Router;
use axum::handler::Handler;
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodFilter, MethodRouter, on};
use control::fleet::{Problem, Role, Scope};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;
use utoipa::openapi::{RefOr, Schema};

use crate::api::guard::{Guarded, guard};
use crate::app::Shared;

/// Where the API is.
pub(crate) const API: &str = "/api/v1";

/// Who may do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Whoever comes.
    Nothing,
    /// A part of the fleet, with its certificate.
    Part,
    /// A person with a role, or a program with a token of this scope whose person has the role.
    Person(Role, Scope),
}

pub(crate) const VIEW: Need = Need::Person(Role::Viewer, Scope::Read);
pub(crate) const OPERATE: Need = Need::Person(Role::Operator, Scope::Operate);
pub(crate) const ENROL: Need = Need::Person(Role::Operator, Scope::Enrol);
pub(crate) const ADMINISTER: Need = Need::Person(Role::Administrator, Scope::Administer);

/// One act.
pub(crate) struct Act {
    method: &'static str,
    path: &'static str,
    need: Need,
    summary: &'static str,
    /// Whether it goes into the audit log.
    audited: bool,
    query: Vec<(&'static str, &'static str, Value)>,
    takes: Option<String>,
    gives: Vec<(u16, &'static str, Option<Value>, &'static str)>,
    schemas: BTreeMap<String, Value>,
    service: MethodRouter<Shared>,
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

impl Act {
    fn new<H, T>(method: &'static str, path: &'static str, need: Need, summary: &'static str, does: H) -> Act
    where
        H: Handler<T, Shared>,
        T: 'static,
    {
        let filter = match method {
            "get" => MethodFilter::GET,
            "post" => MethodFilter::POST,
            "put" => MethodFilter::PUT,
            "patch" => MethodFilter::PATCH,
            _ => MethodFilter::DELETE,
        };
        Act {
            method,
            path,
            need,
            summary,
            audited: method != "get",
            query: Vec::new(),
            takes: None,
            gives: Vec::new(),
            schemas: BTreeMap::new(),
            service: on(filter, does),
        }
    }

    pub(crate) fn get<H, T>(path: &'static str, need: Need, summary: &'static str, does: H) -> Act
    where
        H: Handler<T, Shared>,
        T: 'static,
    {
        Act::new("get", path, need, summary, does)
    }

    pub(crate) fn post<H, T>(path: &'static str, need: Need, summary: &'static str, does: H) -> Act
    where
        H: Handler<T, Shared>,
        T: 'static,
    {
        Act::new("post", path, need, summary, does)
    }

    pub(crate) fn put<H, T>(path: &'static str, need: Need, summary: &'static str, does: H) -> Act
    where
        H: Handler<T, Shared>,
        T: 'static,
    {
        Act::new("put", path, need, summary, does)
    }

    pub(crate) fn patch<H, T>(path: &'static str, need: Need, summary: &'static str, does: H) -> Act
    where
        H: Handler<T, Shared>,
        T: 'static,
    {
        Act::new("patch", path, need, summary, does)
    }

    pub(crate) fn delete<H, T>(path: &'static str, need: Need, summary: &'static str, does: H) -> Act
    where
        H: Handler<T, Shared>,
        T: 'static,
    {
        Act::new("delete", path, need, summary, does)
    }

    /// It happens too often to be kept in the audit log.
    pub(crate) fn unaudited(mut self) -> Act {
        self.audited = false;
        self
    }

    fn note_schema<T: ToSchema>(&mut self) -> String {
        let mut found: Vec<(String, RefOr<Schema>)> = Vec::new();
        T::schemas(&mut found);
        let name = T::name().into_owned();
        found.push((name.clone(), T::schema()));
        for (name, schema) in found {
            let mut schema = serde_json::to_value(schema).unwrap_or_default();
            lean(&mut schema);
            self.schemas.insert(name, schema);
        }
        name
    }

    /// Its body.
    pub(crate) fn takes<T: ToSchema>(mut self) -> Act {
        self.takes = Some(self.note_schema::<T>());
        self
    }

    /// Its answer.
    pub(crate) fn gives<T: ToSchema>(self, status: u16, what: &'static str) -> Act {
        let mut act = self;
        let name = act.note_schema::<T>();
        act.gives.push((status, what, Some(reference(&name)), "application/json"));
        act
    }

    /// Its answer is a part of a list.
    pub(crate) fn gives_page<T: ToSchema>(self, what: &'static str) -> Act {
        let mut act = self;
        let name = act.note_schema::<T>();
        let schema = json!({
            "type": "object",
            "required": ["items"],
            "properties": {
                "items": { "type": "array", "items": reference(&name) },
                "next": { "type": "string", "description": "What to give as `after` for the next part; left out at the end." },
            },
        });
        act.gives.push((200, what, Some(schema), "application/json"));
        let limit = json!({ "type": "integer", "minimum": 1, "maximum": 1000, "default": 100 });
        act.query("after", "`next` of the part before", json!({ "type": "string", "maxLength": 64 })).query(
            "limit",
            "Entries of this part at most",
            limit,
        )
    }

    /// Its answer is an array.
    pub(crate) fn gives_all<T: ToSchema>(self, what: &'static str) -> Act {
        let mut act = self;
        let name = act.note_schema::<T>();
        let schema = json!({ "type": "array", "items": reference(&name) });
        act.gives.push((200, what, Some(schema), "application/json"));
        act
    }

    /// Its answer has no body.
    pub(crate) fn gives_nothing(mut self, what: &'static str) -> Act {
        self.gives.push((204, what, None, "application/json"));
        self
    }

    /// Its answer is a stream of server-sent events, or some other text.
    pub(crate) fn gives_text(mut self, kind: &'static str, what: &'static str) -> Act {
        self.gives.push((200, what, Some(json!({ "type": "string" })), kind));
        self
    }

    /// A parameter after the question mark.
    pub(crate) fn query(mut self, name: &'static str, what: &'static str, schema: Value) -> Act {
        self.query.push((name, what, schema));
        self
    }

    fn parameters(&self) -> Vec<Value> {
        let in_path = self.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        let mut parameters: Vec<Value> = in_path
            .map(|name| {
                json!({
                    "name": name, "in": "path", "required": true,
                    "schema": { "type": "string", "pattern": "^[0-9a-f]{32}$" },
                })
            })
            .collect();
        parameters.extend(self.query.iter().map(|(name, what, schema)| {
            json!({ "name": name, "in": "query", "required": false, "description": what, "schema": schema })
        }));
        parameters
    }

    fn document(&self) -> Value {
        let mut responses = Map::new();
        for (status, what, schema, kind) in &self.gives {
            let mut response = json!({ "description": what });
            if let Some(schema) = schema {
                response["content"] = json!({ *kind: { "schema": schema } });
            }
            responses.insert(status.to_string(), response);
        }
        responses.insert(
            "default".to_owned(),
            json!({
                "description": "Why it was not done, and what to do.",
                "content": { "application/problem+json": { "schema": reference("Problem") } },
            }),
        );
        let (security, who) = match self.need {
            Need::Nothing => (json!([]), "anybody".to_owned()),
            Need::Part => (json!([{ "certificate": [] }]), "a part of the fleet".to_owned()),
            Need::Person(role, scope) => (
                json!([{ "token": [] }, { "session": [] }]),
                format!("a {role}; tokens need the scope {}", scope.as_str()),
            ),
        };
        let mut operation = json!({
            "operationId": self.operation_id(),
            "summary": self.summary,
            "description": format!("For {who}."),
            "security": security,
            "responses": responses,
        });
        let parameters = self.parameters();
        if !parameters.is_empty() {
            operation["parameters"] = Value::Array(parameters);
        }
        if let Some(name) = &self.takes {
            operation["requestBody"] = json!({
                "required": true,
                "content": { "application/json": { "schema": reference(name) } },
            });
        }
        operation
    }

    fn operation_id(&self) -> String {
        let words = self.path.split('/').filter(|part| !part.is_empty() && !part.starts_with('{'));
        let mut id = self.method.to_owned();
        for word in words {
            id.push('-');
            id.push_str(word);
        }
        if self.path.ends_with('}') {
            id.push_str("-one");
        }
        id
    }
}

/// Docs of Rust's own links and line breaks are not for the document's readers.
fn lean(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            if let Some(Value::String(text)) = map.get_mut("description") {
                *text = text.replace('\n', " ");
            }
            map.values_mut().for_each(lean);
        }
        Value::Array(items) => items.iter_mut().for_each(lean),
        _ => {}
    }
}

/// The router of all acts, each behind its guard.
pub(crate) fn router(acts: Vec<Act>, app: &Shared) -> Router<Shared> {
    let mut router = Router::new();
    for act in acts {
        let path = format!("{API}{}", act.path);
        let label = format!("{} {path}", act.method.to_uppercase());
        let guarded = Guarded {
            app: app.clone(),
            need: act.need,
            label: label.into(),
            audited: act.audited,
            parameters: act.query.iter().map(|(name, ..)| *name).collect(),
        };
        router = router.route(&path, act.service.layer(from_fn_with_state(guarded, guard)));
    }
    router
}

/// The OpenAPI document of all acts.
pub(crate) fn document(acts: &[Act]) -> Value {
    let mut paths: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    let mut schemas: BTreeMap<String, Value> = BTreeMap::new();
    for act in acts {
        let path = paths.entry(format!("{API}{}", act.path)).or_default();
        path.insert(act.method.to_owned(), act.document());
        schemas.extend(act.schemas.clone());
    }
    let mut problem = serde_json::to_value(<Problem as utoipa::PartialSchema>::schema()).unwrap_or_default();
    lean(&mut problem);
    schemas.insert("Problem".to_owned(), problem);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Seawall config server",
            "version": "1",
            "description": "Who may talk to whom, what is protected and how, what is happening, and every button.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": { "type": "http", "scheme": "bearer", "description": "A token that a user has made." },
                "session": {
                    "type": "apiKey", "in": "cookie", "name": crate::api::guard::COOKIE,
                    "description": "Of a login. Whatever changes something needs the header X-Seawall-CSRF too.",
                },
                "certificate": { "type": "mutualTLS", "description": "Of the fleet's own authority." },
            },
        },
    })
}
