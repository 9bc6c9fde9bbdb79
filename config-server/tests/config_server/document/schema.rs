//! What the document says of values: whether one is as it says, one that is, and one that perhaps is not.

use serde_json::{Map, Value, json};

/// Numbers that a seed gives again.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Dice {
        Dice(seed | 1)
    }

    /// Less than `sides`.
    pub(super) fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides.max(1)
    }

    pub(super) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.roll(from.len())]
    }
}

/// Characters that programs have stumbled over.
const ODD: [&str; 12] =
    ["a", "Z", "0", " ", "'", "\"", "\\", "\u{e4}", "\u{1f600}", "\u{202e}", "\n", "\u{0}"];

/// The OpenAPI document.
pub(super) struct Document {
    pub(super) root: Value,
    /// Texts that name something here.
    pub(super) names: Vec<String>,
    pub(super) ids: Vec<String>,
}

impl Document {
    fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        match schema["$ref"].as_str() {
            None => schema,
            Some(path) => {
                let path = path.strip_prefix('#').expect("a reference into the document");
                let found = self.root.pointer(path);
                self.resolve(found.unwrap_or_else(|| panic!("{path} is not in the document")))
            }
        }
    }

    /// In what a value is not as its schema says.
    pub(super) fn violations(&self, schema: &Value, value: &Value) -> Vec<String> {
        let mut found = Vec::new();
        self.look(schema, value, "", &mut found);
        found
    }

    fn look(&self, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
        let schema = self.resolve(schema);
        for (word, least) in [("oneOf", 1), ("anyOf", 1), ("allOf", usize::MAX)] {
            if let Some(schemas) = schema[word].as_array() {
                let fits = schemas.iter().filter(|schema| self.violations(schema, value).is_empty()).count();
                if fits < least.min(schemas.len()) {
                    found.push(format!("{at}: {value} fits {fits} of {} in {word}", schemas.len()));
                }
            }
        }
        if let Some(allowed) = schema["enum"].as_array()
            && !allowed.contains(value)
        {
            found.push(format!("{at}: {value} is none of {allowed:?}"));
        }
        let types = types(schema);
        if !types.is_empty() && !types.iter().any(|kind| is(kind, value)) {
            found.push(format!("{at}: {value} is not {types:?}"));
            return;
        }
        let mut bound = |word: &str, measured: Option<f64>, wrong: fn(f64, f64) -> bool| {
            if let Some((limit, measured)) = schema[word].as_f64().zip(measured)
                && wrong(measured, limit)
            {
                found.push(format!("{at}: {measured} is against {word} {limit}"));
            }
        };
        let characters = value.as_str().map(|text| text.chars().count() as f64);
        let entries = value.as_array().map(|entries| entries.len() as f64);
        for (least, most, measured) in [
            ("minimum", "maximum", value.as_f64()),
            ("minLength", "maxLength", characters),
            ("minItems", "maxItems", entries),
        ] {
            bound(least, measured, |measured, limit| measured < limit);
            bound(most, measured, |measured, limit| measured > limit);
        }
        for (place, entry) in value.as_array().into_iter().flatten().enumerate() {
            self.look(&schema["items"], entry, &format!("{at}/{place}"), found);
        }
        let Some(object) = value.as_object() else { return };
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !object.contains_key(name) {
                found.push(format!("{at}: {name} is missing"));
            }
        }
        for (name, value) in object {
            match schema["properties"].get(name) {
                Some(schema) => self.look(schema, value, &format!("{at}/{name}"), found),
                None if schema["additionalProperties"] == false => {
                    found.push(format!("{at}: {name} is unknown"))
                }
                None => {}
            }
        }
    }

    /// A value that is as its schema says.
    pub(super) fn valid(&self, dice: &mut Dice, schema: &Value) -> Value {
        let schema = self.resolve(schema);
        if let Some(schemas) = schema["oneOf"].as_array().or(schema["anyOf"].as_array()) {
            let chosen = dice.pick(schemas);
            return self.valid(dice, chosen);
        }
        if let Some(schemas) = schema["allOf"].as_array() {
            let mut all = Map::new();
            for schema in schemas {
                if let Value::Object(part) = self.valid(dice, schema) {
                    all.extend(part);
                }
            }
            return all.into();
        }
        if let Some(allowed) = schema["enum"].as_array() {
            return dice.pick(allowed).clone();
        }
        let types = types(schema);
        let kind = if types.is_empty() { "object" } else { dice.pick(&types) };
        let bound = |word: &str, otherwise: i64| schema[word].as_i64().unwrap_or(otherwise);
        match kind {
            "null" => Value::Null,
            "boolean" => (dice.roll(2) == 0).into(),
            "integer" => {
                let (least, most) = (bound("minimum", -1000), bound("maximum", 1_000_000));
                let within =
                    least.saturating_add(dice.roll(most.abs_diff(least).min(1 << 30) as usize + 1) as i64);
                (*dice.pick(&[least, most, within, within])).into()
            }
            "number" => json!(dice.roll(1_000_000) as f64 / 7.0),
            "string" => self.text(dice, schema).into(),
            "array" => {
                let (least, most) = (bound("minItems", 0), bound("maxItems", 4).min(6));
                let count = least as usize + dice.roll((most - least).max(0) as usize + 1);
                (0..count).map(|_| self.valid(dice, &schema["items"])).collect()
            }
            _ => {
                let mut object = Map::new();
                let required = schema["required"].as_array().cloned().unwrap_or_default();
                for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
                    if required.contains(&name.as_str().into()) || dice.roll(2) == 0 {
                        object.insert(name.clone(), self.valid(dice, schema));
                    }
                }
                object.into()
            }
        }
    }

    /// A value as its schema says with everything in it that may be and of which the schema says what it is.
    pub(super) fn full(&self, dice: &mut Dice, schema: &Value) -> Value {
        let schema = self.resolve(schema);
        let some = |schemas: &Value| {
            let null = |one: &&Value| types(self.resolve(one)) == ["null"];
            schemas.as_array().and_then(|all| all.iter().find(|one| !null(one))).cloned()
        };
        if let Some(chosen) = some(&schema["oneOf"]).or(some(&schema["anyOf"])) {
            return self.full(dice, &chosen);
        }
        if let Some(properties) = schema["properties"].as_object() {
            let vague = |schema: &Value| {
                let schema = self.resolve(schema);
                let entries =
                    if schema["items"].is_object() { self.resolve(&schema["items"]) } else { schema };
                types(entries).contains(&"object") && !entries["properties"].is_object()
            };
            let told = properties.iter().filter(|(_, schema)| !vague(schema));
            let each = told.map(|(name, schema)| (name.clone(), self.full(dice, schema)));
            return each.collect::<Map<_, _>>().into();
        }
        let (is_text, least) = (types(schema).contains(&"string"), schema["minLength"].as_u64().unwrap_or(1));
        match schema["items"].is_object() {
            true => json!([self.full(dice, &schema["items"])]),
            false if is_text && !schema["pattern"].is_string() && !schema["enum"].is_array() => {
                "x".repeat(least as usize).into()
            }
            false => loop {
                let value = self.valid(dice, schema);
                if !value.is_null() {
                    return value;
                }
            },
        }
    }

    /// For each limit of a schema, the full value with one place past this limit.
    pub(super) fn beyond(&self, full: &Value, schema: &Value) -> Vec<Value> {
        let mut places = Vec::new();
        list(full, String::new(), &mut places);
        let mut found = Vec::new();
        for at in places {
            let Some(schema) = self.schema_at(schema, &at) else { continue };
            let place = full.pointer(&at).expect("a place in the value");
            let limit = |word: &str| schema[word].as_u64();
            let number = |word: &str| schema[word].as_i64();
            let past = [
                limit("maxLength").map(|most| "x".repeat(most as usize + 1).into()),
                limit("minLength")
                    .and_then(|least| least.checked_sub(1))
                    .map(|few| "x".repeat(few as usize).into()),
                limit("maxItems")
                    .zip(place.as_array())
                    .map(|(most, all)| all.iter().cycle().take(most as usize + 1).cloned().collect()),
                limit("minItems").filter(|least| *least == 1).map(|_| json!([])),
                // As far as numbers with 53 bits can tell.
                number("maximum").and_then(|most| most.checked_add(1 + (most >> 52))).map(Value::from),
                number("minimum").and_then(|least| least.checked_sub(1)).map(Value::from),
            ];
            for past in past.into_iter().flatten() {
                let mut value = full.clone();
                *value.pointer_mut(&at).expect("the same place") = past;
                found.push(value);
            }
        }
        found
    }

    /// The schema of what is at a pointer into a full value.
    fn schema_at(&self, schema: &Value, at: &str) -> Option<Value> {
        let mut schema = self.resolve(schema).clone();
        for step in at.split('/').skip(1) {
            let alone = schema["oneOf"].as_array().or(schema["anyOf"].as_array()).cloned();
            if let Some(one) =
                alone.and_then(|all| all.into_iter().find(|one| types(self.resolve(one)) != ["null"]))
            {
                schema = self.resolve(&one).clone();
            }
            let next =
                if schema["items"].is_object() { &schema["items"] } else { &schema["properties"][step] };
            schema = next.is_object().then(|| self.resolve(next).clone())?;
        }
        Some(schema)
    }

    fn text(&self, dice: &mut Dice, schema: &Value) -> String {
        match schema["pattern"].as_str() {
            Some("^[0-9a-f]{32}$") => return dice.pick(&self.ids).clone(),
            Some("^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$") => {
                return format!("n-{}.{}", dice.roll(1 << 20), dice.roll(9));
            }
            Some("^https?://") => return format!("http://127.0.0.1:{}/hook", 1 + dice.roll(9)),
            Some("^(application|filesystem|crash)$") => {
                return (*dice.pick(&["application", "filesystem", "crash"])).to_owned();
            }
            Some("^(latest|application|[1-9][0-9]{0,18})$") => {
                return (*dice.pick(&["latest", "application", "7"])).to_owned();
            }
            Some("^([01][0-9]|2[0-3]):[0-5][0-9]$") => {
                return format!("{:02}:{:02}", dice.roll(24), dice.roll(60));
            }
            Some("^[A-Za-z0-9_+/-]{1,64}$") => return "Europe/Berlin".to_owned(),
            Some(other) => panic!("a text of the pattern {other} cannot be made; add it here"),
            None => {}
        }
        let (least, most) =
            (schema["minLength"].as_u64().unwrap_or(0), schema["maxLength"].as_u64().unwrap_or(40));
        let named = dice.pick(&self.names).clone();
        if dice.roll(3) == 0 && (least..=most).contains(&(named.len() as u64)) {
            return named;
        }
        let within = least + dice.roll((most - least).min(60) as usize + 1) as u64;
        let length = *dice.pick(&[least, within, within, most.min(4096)]);
        (0..length).map(|_| *dice.pick(&ODD)).collect()
    }

    /// The value with one thing changed, which is perhaps not as the schema says any more.
    pub(super) fn changed(&self, dice: &mut Dice, value: &Value) -> Value {
        let mut places = Vec::new();
        list(value, String::new(), &mut places);
        let mut changed = value.clone();
        let at = dice.pick(&places).clone();
        let place = changed.pointer_mut(&at).expect("a place in the value");
        match (dice.roll(4), &mut *place) {
            (0, Value::Object(object)) if !object.is_empty() => {
                let names: Vec<String> = object.keys().cloned().collect();
                object.remove(dice.pick(&names));
            }
            (1, Value::Object(object)) => {
                object.insert((*dice.pick(&["unknown", "", "__proto__", "Name"])).to_owned(), json!(1));
            }
            // Further inside JSON's reader takes an array of an object's values for the object; so it is here only.
            (2, Value::Object(object)) if at.is_empty() => {
                *place = object.values().cloned().collect::<Vec<_>>().into()
            }
            (_, Value::Array(entries)) if dice.roll(2) == 0 && !entries.is_empty() => {
                *place = entries.iter().cycle().take(1100).cloned().collect::<Vec<_>>().into();
            }
            _ => {
                let numbers = [i64::MIN, -1, 0, 1, 1 << 31, 1 << 53, i64::MAX];
                let texts = ["", "\u{0}", "0", "../../x", "%00", "' OR 1=1 --", "\u{1f600}\u{202e}"];
                *place = match dice.roll(9) {
                    0 => Value::Null,
                    1 => true.into(),
                    2 | 3 => (*dice.pick(&numbers)).into(),
                    4 => json!(u64::MAX),
                    5 => json!(1e308),
                    6 => (*dice.pick(&texts)).into(),
                    7 => "x".repeat(*dice.pick(&[65, 129, 256, 2001, 20_000])).into(),
                    _ => json!([{}]),
                };
            }
        }
        changed
    }
}

fn types(schema: &Value) -> Vec<&str> {
    match &schema["type"] {
        Value::String(kind) => vec![kind],
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

fn is(kind: &str, value: &Value) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        _ => value.is_object(),
    }
}

/// Pointers to everything in a value.
fn list(value: &Value, at: String, places: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                list(value, format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")), places);
            }
        }
        Value::Array(entries) => {
            for (place, value) in entries.iter().enumerate() {
                list(value, format!("{at}/{place}"), places);
            }
        }
        _ => {}
    }
    places.push(at);
}
