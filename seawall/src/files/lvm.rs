//! Where LVM's volumes lie, read from the metadata as `pvck` prints it. Nothing is activated: volume groups of the same name or
//! identity on this machine, such as the source's own, are not touched.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail, ensure};
use block::{ByteCount, SECTOR_BYTES};

/// Sections within sections of metadata. Deeper ones are refused.
const DEPTH_MAX: usize = 16;

/// A logical volume.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Volume {
    /// `vg/lv`.
    pub(super) name: String,
    pub(super) size: ByteCount,
    /// Offset and length on the physical volume, in bytes; or why it cannot be used.
    pub(super) place: Result<(u64, u64), String>,
}

pub(super) fn volumes(device: &Path) -> anyhow::Result<Vec<Volume>> {
    let config = format!("devices {{ use_devicesfile=0 filter=[\"a|^{}$|\",\"r|.*|\"] }}", device.display());
    let output = Command::new("pvck").args(["--config", &config, "--dump", "metadata"]).arg(device).output();
    let output = output.context("LVM; to look into it pvck is needed, of lvm2")?;
    ensure!(
        output.status.success(),
        "LVM, whose metadata cannot be read: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    parse(&String::from_utf8_lossy(&output.stdout))
}

#[derive(Debug, PartialEq, Eq)]
enum Value {
    Text(String),
    List(Vec<String>),
    Section(BTreeMap<String, Value>),
}

impl Value {
    fn number(&self, key: &str) -> anyhow::Result<u64> {
        let text = self.get(key).and_then(|value| match value {
            Value::Text(text) => text.parse().ok(),
            _ => None,
        });
        text.with_context(|| format!("LVM, whose metadata has no number {key}"))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        match self {
            Value::Section(entries) => entries.get(key),
            _ => None,
        }
    }

    fn sections(&self, key: &str) -> impl Iterator<Item = (&String, &Value)> {
        let entries = match self.get(key) {
            Some(Value::Section(entries)) => Some(entries),
            _ => None,
        };
        entries.into_iter().flatten().filter(|(_, value)| matches!(value, Value::Section(_)))
    }
}

fn parse(dump: &str) -> anyhow::Result<Vec<Volume>> {
    // pvck says where the text lies before and puts lines of its own around it.
    let lines = dump
        .lines()
        .filter(|line| !line.trim_start().starts_with("metadata text at") && line.trim() != "---");
    let text: String = lines.flat_map(|line| [line, "\n"]).collect();
    let mut tokens = tokens(&text).into_iter().peekable();
    let top = Value::Section(section(&mut tokens, 0)?);
    let Value::Section(entries) = &top else { bail!("LVM, whose metadata is empty") };
    let group = entries.iter().find(|(_, value)| value.get("extent_size").is_some());
    let (group_name, group) = group.context("LVM, whose metadata names no volume group")?;
    let extent = group.number("extent_size")?.saturating_mul(SECTOR_BYTES);
    let physical: BTreeMap<&String, &Value> = group.sections("physical_volumes").collect();
    let mut volumes = Vec::new();
    for (name, volume) in group.sections("logical_volumes") {
        let count = volume.number("segment_count")?;
        let segments = (1..=count).map_while(|number| volume.get(&format!("segment{number}")));
        let segments: Vec<&Value> = segments.collect();
        let extents =
            segments.iter().map(|segment| segment.number("extent_count")).sum::<anyhow::Result<u64>>()?;
        let bytes = extents.saturating_mul(extent);
        let place = match segments.as_slice() {
            _ if physical.len() != 1 => Err("its volume group spans several disks".to_owned()),
            [only] => place(only, &physical, extent).map(|offset| (offset, bytes)),
            several => Err(format!("it has {} segments", several.len())),
        };
        let place = place.map_err(|why| format!("{why}; activate it on `seawall export --writable`"));
        volumes.push(Volume { name: format!("{group_name}/{name}"), size: ByteCount(bytes), place });
    }
    Ok(volumes)
}

/// Where a segment begins.
fn place(segment: &Value, physical: &BTreeMap<&String, &Value>, extent: u64) -> Result<u64, String> {
    match segment.get("type") {
        Some(Value::Text(kind)) if kind == "striped" => {}
        Some(Value::Text(kind)) => return Err(format!("it is of type {kind}")),
        _ => return Err("its type is not told".to_owned()),
    }
    let Some(Value::List(stripes)) = segment.get("stripes") else {
        return Err("it has no stripes".to_owned());
    };
    let [disk, first] = stripes.as_slice() else { return Err("it is striped".to_owned()) };
    let start = physical.get(disk).and_then(|disk| disk.number("pe_start").ok());
    let offset =
        first.parse::<u64>().ok().zip(start).and_then(|(first, start)| {
            first.checked_mul(extent)?.checked_add(start.checked_mul(SECTOR_BYTES)?)
        });
    offset.ok_or_else(|| "its place makes no sense".to_owned())
}

/// Words, texts in quotes without them, and the signs `{ } [ ] = ,`. Comments are left out.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = text.chars().peekable();
    while let Some(next) = rest.next() {
        match next {
            '#' => while rest.next_if(|char| *char != '\n').is_some() {},
            '"' => {
                let mut token = String::new();
                while let Some(char) = rest.next().filter(|char| *char != '"') {
                    token.push(if char == '\\' { rest.next().unwrap_or(char) } else { char });
                }
                tokens.push(token);
            }
            '{' | '}' | '[' | ']' | '=' | ',' => tokens.push(next.to_string()),
            other if other.is_whitespace() => {}
            other => {
                let mut token = other.to_string();
                while let Some(char) =
                    rest.next_if(|char| !char.is_whitespace() && !"{}[]=,#\"".contains(*char))
                {
                    token.push(char);
                }
                tokens.push(token);
            }
        }
    }
    tokens
}

/// Entries up to the end of the section.
fn section(
    tokens: &mut std::iter::Peekable<impl Iterator<Item = String>>,
    depth: usize,
) -> anyhow::Result<BTreeMap<String, Value>> {
    ensure!(depth < DEPTH_MAX, "LVM, whose metadata is nested too deeply");
    let mut entries = BTreeMap::new();
    while let Some(key) = tokens.next() {
        if key == "}" {
            break;
        }
        let value = match tokens.next().as_deref() {
            Some("{") => Value::Section(section(tokens, depth + 1)?),
            Some("=") if tokens.next_if(|token| token == "[").is_some() => {
                let mut list = Vec::new();
                for token in tokens.by_ref().take_while(|token| token != "]") {
                    if token != "," {
                        list.push(token);
                    }
                }
                Value::List(list)
            }
            Some("=") => Value::Text(tokens.next().unwrap_or_default()),
            _ => bail!("LVM, whose metadata cannot be understood at {key:?}"),
        };
        entries.insert(key, value);
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As pvck of LVM 2.03.16 printed it, shortened.
    const DUMP: &str = r#"  metadata text at 5632 crc 0x746f1a34 # vgname testvg seqno 2
  ---
testvg {
id = "I8Dtve-AVxd"
seqno = 2
status = ["RESIZEABLE", "READ", "WRITE"]
extent_size = 8192
physical_volumes {

pv0 {
id = "slvWK2"
device = "/dev/loop2"
pe_start = 2048
pe_count = 15
}
}
logical_volumes {
root {
segment_count = 1
segment1 {
start_extent = 0
extent_count = 10
type = "striped"
stripe_count = 1
stripes = [
"pv0", 2
]
}
}
long {
segment_count = 2
segment1 { start_extent = 0
extent_count = 1
type = "striped"
stripes = ["pv0", 12] }
segment2 { start_extent = 1
extent_count = 2
type = "striped"
stripes = ["pv0", 0] }
}
thin {
segment_count = 1
segment1 { start_extent = 0
extent_count = 1
type = "thin" }
}
}
}
# Generated by LVM2 version 2.03.16(2) (2022-05-18): Sat Nov 21 15:50:52 2026
contents = "Text Format Volume Group"
description = "it's \"so\" # no comment"
  ---
"#;

    #[test]
    fn volumes_are_found_where_they_lie() {
        let volumes = parse(DUMP).unwrap();
        let root = volumes.iter().find(|volume| volume.name == "testvg/root").unwrap();
        assert_eq!(root.place, Ok((1024 * 1024 + 2 * (4 << 20), 40 << 20)));
        assert_eq!(root.size, ByteCount::mib(40));
        let problem = |name: &str| {
            let volume = volumes.iter().find(|volume| volume.name == name).unwrap();
            volume.place.clone().unwrap_err()
        };
        assert!(problem("testvg/long").contains("2 segments"));
        assert!(problem("testvg/thin").contains("type thin"));
        assert!(parse("").is_err());
    }

    proptest! {
        #[test]
        fn no_text_does_harm(text in "[a-z0-9{}=\\[\\],\"# \\\\\n]{0,300}", at in 0..DUMP.len()) {
            let _ = parse(&text);
            let mut changed = DUMP.to_owned();
            changed.insert_str(at, &text);
            let _ = parse(&changed);
        }
    }
}
