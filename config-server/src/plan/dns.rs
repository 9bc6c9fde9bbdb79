//! Dynamic updates of DNS (RFC 2136), signed with TSIG (RFC 8945), over TCP. One update replaces all records of each name and type: it is
//! done whole or not at all, and doing it twice does no harm.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use control::fleet::UnixMillis;
use control::fleet::plan::{PlanDns, PlanRecord, PlanRecordType};
use data_encoding::BASE64;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::tsig::TsigAlgorithm;
use hickory_proto::rr::rdata::{A, AAAA, CNAME, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType, TSigner};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};

use super::effect::Trouble;

/// How long a server may take for one question.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);
/// How far the clocks of both may be apart, in seconds: what servers have.
const FUDGE_S: u16 = 300;
/// The largest file of a key, in bytes.
const KEY_FILE_BYTES_MAX: u64 = 64 * 1024;

/// Makes the records what the plan says.
pub(super) async fn update(keys: Option<&Path>, dns: &PlanDns) -> Result<String, Trouble> {
    let message = update_message(dns).map_err(Trouble::Final)?;
    let signer = signer(keys, dns)?;
    ask(dns, message, signer).await?;
    Ok(format!("{} has {} of {}.", dns.server, records(dns.records.len()), dns.zone))
}

fn records(count: usize) -> String {
    if count == 1 { "1 changed record".to_owned() } else { format!("{count} changed records") }
}

/// Looks whether that could be done: the key is there, and the server knows the zone.
pub(super) async fn check(keys: Option<&Path>, dns: &PlanDns) -> Result<String, Trouble> {
    update_message(dns).map_err(Trouble::Final)?;
    signer(keys, dns)?;
    let zone = name(&dns.zone).map_err(Trouble::Final)?;
    let mut message = Message::new(new_message_id(), MessageType::Query, OpCode::Query);
    message.add_query(Query::query(zone.clone(), RecordType::SOA));
    let answer = ask(dns, message, None).await?;
    let has =
        answer.answers.iter().any(|record| record.record_type() == RecordType::SOA && record.name == zone);
    match has && answer.metadata.authoritative {
        true => Ok(format!(
            "{} is an authority for {}; whether it takes updates is known only when one is made.",
            dns.server, dns.zone
        )),
        false => Err(Trouble::Final(format!(
            "the server {} is no authority for the zone {}",
            dns.server, dns.zone
        ))),
    }
}

fn name(text: &str) -> Result<Name, String> {
    let mut name = Name::from_ascii(text).map_err(|error| format!("use the name {text:?}: {error}"))?;
    name.set_fqdn(true);
    Ok(name)
}

fn update_message(dns: &PlanDns) -> Result<Message, String> {
    let zone = name(&dns.zone)?;
    let mut message = Message::new(new_message_id(), MessageType::Query, OpCode::Update);
    message.add_query(Query::query(zone.clone(), RecordType::SOA));
    for record in &dns.records {
        let (owner, kind) = (owner(record, &zone)?, type_of(record.kind));
        // RFC 2136, 2.5.2: the whole set goes, and what is to be there is added.
        let mut gone = Record::update0(owner.clone(), 0, kind);
        gone.dns_class = DNSClass::ANY;
        message.add_authority(gone);
        for value in &record.values {
            message.add_authority(Record::from_rdata(owner.clone(), record.ttl_s, data(record.kind, value)?));
        }
    }
    Ok(message)
}

fn owner(record: &PlanRecord, zone: &Name) -> Result<Name, String> {
    if record.name == "@" {
        return Ok(zone.clone());
    }
    if record.name.ends_with('.') {
        let whole = name(&record.name)?;
        return match zone.zone_of(&whole) {
            true => Ok(whole),
            false => Err(format!("the record {} does not lie in the zone {zone}", record.name)),
        };
    }
    let relative =
        Name::from_ascii(&record.name).map_err(|error| format!("use the name {:?}: {error}", record.name))?;
    relative.append_domain(zone).map_err(|error| format!("use the name {:?}: {error}", record.name))
}

fn type_of(kind: PlanRecordType) -> RecordType {
    match kind {
        PlanRecordType::A => RecordType::A,
        PlanRecordType::Aaaa => RecordType::AAAA,
        PlanRecordType::Cname => RecordType::CNAME,
        PlanRecordType::Txt => RecordType::TXT,
    }
}

fn data(kind: PlanRecordType, value: &str) -> Result<RData, String> {
    fn read<T: FromStr>(value: &str) -> Result<T, String>
    where
        T::Err: std::fmt::Display,
    {
        value.parse().map_err(|error| format!("use the value {value:?}: {error}"))
    }
    Ok(match kind {
        PlanRecordType::A => RData::A(A(read(value)?)),
        PlanRecordType::Aaaa => RData::AAAA(AAAA(read(value)?)),
        PlanRecordType::Cname => RData::CNAME(CNAME(name(value)?)),
        PlanRecordType::Txt => RData::TXT(TXT::new(vec![value.to_owned()])),
    })
}

/// A number that others cannot guess; TCP and TSIG protect the rest.
fn new_message_id() -> u16 {
    let id = crate::secret::new_id();
    u16::from_str_radix(&id.as_str()[..4], 16).unwrap_or_default()
}

fn signer(keys: Option<&Path>, dns: &PlanDns) -> Result<Option<TSigner>, Trouble> {
    let Some(key) = &dns.key else { return Ok(None) };
    let Some(keys) = keys else {
        return Err(Trouble::Final(format!(
            "use the key {key}: this config server has no keys; name their directory in its configuration: dns_keys = \"/etc/seawall/dns-keys\""
        )));
    };
    let path = keys.join(format!("{key}.key"));
    read_key(&path)
        .map(Some)
        .map_err(|error| Trouble::Final(format!("read the TSIG key {}: {error}", path.display())))
}

/// Reads a key as `tsig-keygen` writes it: `key "name" { algorithm hmac-sha256; secret "..."; };`.
fn read_key(path: &Path) -> Result<TSigner, String> {
    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if metadata.mode() & 0o007 != 0 {
        return Err(format!("others can read it (mode {:04o}); chmod o-rwx it", metadata.mode() & 0o7777));
    }
    if metadata.len() > KEY_FILE_BYTES_MAX {
        return Err(format!("it has {} bytes, at most {KEY_FILE_BYTES_MAX} go", metadata.len()));
    }
    key_of_text(&std::fs::read_to_string(path).map_err(|error| error.to_string())?)
}

fn key_of_text(text: &str) -> Result<TSigner, String> {
    let words = words_of(text);
    // A key may be called as what is in its block.
    let (head, block) = words.split_at(words.iter().position(|word| word == "{").unwrap_or(words.len()));
    let needed = |word: &str, within: &[String]| {
        let place = within.iter().position(|own| own == word);
        place.and_then(|place| within.get(place + 1)).cloned().ok_or_else(|| {
            format!("it has no `{word}`; expected `key \"NAME\" {{ algorithm hmac-sha256; secret \"...\"; }};`, as tsig-keygen writes it")
        })
    };
    let (owner, algorithm) = (name(&needed("key", head)?)?, needed("algorithm", block)?.to_ascii_lowercase());
    let known =
        Name::from_ascii(&algorithm).map(TsigAlgorithm::from_name).map_err(|error| error.to_string())?;
    if !known.supported() {
        return Err(format!(
            "its algorithm {algorithm} is not one of hmac-sha256, hmac-sha384 and hmac-sha512"
        ));
    }
    // What the secret is not said, also where it is wrong.
    let secret = BASE64
        .decode(needed("secret", block)?.as_bytes())
        .map_err(|_| "its secret is not base64".to_owned())?;
    TSigner::new(secret, known, owner, FUDGE_S).map_err(|error| error.to_string())
}

/// The words of named.conf's grammar, without its three kinds of comments. What is quoted is a word whatever is in it: the base64 of one
/// secret in a hundred has a `//`.
fn words_of(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end_of =
            |mark: &str| rest[first.len_utf8()..].find(mark).map_or(rest.len(), |at| at + first.len_utf8());
        let next = if first == '"' {
            let end = end_of("\"");
            words.push(rest[1..end].to_owned());
            end + 1
        } else if first == '#' || rest.starts_with("//") {
            end_of("\n")
        } else if let Some(comment) = rest.strip_prefix("/*") {
            comment.find("*/").map_or(rest.len(), |at| at + 4)
        } else if first.is_whitespace() || "{};".contains(first) {
            if !first.is_whitespace() {
                words.push(first.to_string());
            }
            first.len_utf8()
        } else {
            let end = rest.find(|c: char| c.is_whitespace() || "{};\"".contains(c)).unwrap_or(rest.len());
            words.push(rest[..end].to_owned());
            end
        };
        rest = rest.get(next..).unwrap_or_default();
    }
    words
}

/// Asks the server; the answer is one that it signed, if the question was.
async fn ask(dns: &PlanDns, message: Message, signer: Option<TSigner>) -> Result<Message, Trouble> {
    match tokio::time::timeout(ANSWER_TIME_MAX, converse(dns, message, signer)).await {
        Ok(answer) => answer,
        Err(_) => Err(Trouble::Passing(format!(
            "the DNS server {} has not answered for {} s",
            dns.server,
            ANSWER_TIME_MAX.as_secs()
        ))),
    }
}

async fn converse(dns: &PlanDns, mut message: Message, signer: Option<TSigner>) -> Result<Message, Trouble> {
    let unreached =
        |error: std::io::Error| Trouble::Passing(format!("ask the DNS server {}: {error}", dns.server));
    let senseless = |error: String| Trouble::Final(format!("ask the DNS server {}: {error}", dns.server));
    let (host, port) = dns.address().map_err(Trouble::Final)?;
    let addresses: Vec<SocketAddr> = lookup_host((host, port)).await.map_err(unreached)?.collect();
    let now = u64::try_from(UnixMillis::now().0 / 1000).unwrap_or_default();
    let verifier = match &signer {
        Some(signer) => message.finalize(signer, now).map_err(|error| senseless(error.to_string()))?,
        None => None,
    };
    let question = message.to_vec().map_err(|error| senseless(error.to_string()))?;
    let length = u16::try_from(question.len())
        .map_err(|_| Trouble::Final(format!("the update has {} bytes; DNS takes 65535", question.len())))?;
    let mut stream = TcpStream::connect(&addresses[..]).await.map_err(unreached)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(&question);
    stream.write_all(&framed).await.map_err(unreached)?;
    let length = stream.read_u16().await.map_err(unreached)?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await.map_err(unreached)?;
    let read = Message::from_vec(&answer)
        .map_err(|error| senseless(format!("its answer cannot be read: {error}")))?;
    if read.metadata.id != message.metadata.id {
        return Err(senseless("it answered another question".to_owned()));
    }
    match read.metadata.response_code {
        ResponseCode::NoError => {}
        ResponseCode::ServFail => {
            return Err(Trouble::Passing(format!("the DNS server {} failed (SERVFAIL)", dns.server)));
        }
        // Whatever it says of why not is believed unsigned too: nothing was done.
        code => return Err(senseless(format!("it refused: {code} ({})", meaning(code)))),
    }
    if let Some(mut verifier) = verifier {
        verifier
            .verify(&answer)
            .map_err(|error| senseless(format!("its answer is not signed by the key: {error}")))?;
    }
    Ok(read)
}

fn meaning(code: ResponseCode) -> &'static str {
    match code {
        ResponseCode::Refused => {
            "its configuration does not let this be changed; look at its rules for updates"
        }
        ResponseCode::NotAuth | ResponseCode::BADSIG | ResponseCode::BADKEY => {
            "it does not know the key or is no authority for the zone; compare key and zone with its configuration"
        }
        ResponseCode::BADTIME => "the clocks are apart",
        ResponseCode::NotZone => "a record lies outside the zone",
        ResponseCode::NXDomain => "there is no such zone",
        ResponseCode::NotImp => "it takes no updates",
        _ => "look at its log",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dns(records: &[(&str, PlanRecordType, &[&str])]) -> PlanDns {
        PlanDns {
            server: "ns".into(),
            zone: "example.com".into(),
            key: None,
            records: records
                .iter()
                .map(|(name, kind, values)| PlanRecord {
                    name: (*name).to_owned(),
                    kind: *kind,
                    ttl_s: 60,
                    values: values.iter().map(|value| (*value).to_owned()).collect(),
                })
                .collect(),
        }
    }

    /// What was there goes first, so that what is there afterwards does not depend on it.
    #[test]
    fn an_update_replaces_each_name_and_type() {
        let asked = dns(&[
            ("www", PlanRecordType::A, &["192.0.2.1", "192.0.2.2"]),
            ("@", PlanRecordType::Txt, &["a b"]),
            ("old.example.com.", PlanRecordType::Cname, &[]),
        ]);
        let message = update_message(&asked).unwrap();
        let read = Message::from_vec(&message.to_vec().unwrap()).unwrap();
        let shown: Vec<String> = read
            .authorities
            .iter()
            .map(|record| {
                format!("{} {} {} {}", record.name, record.dns_class, record.ttl, record.record_type())
            })
            .collect();
        assert_eq!(
            shown,
            [
                "www.example.com. ANY 0 A",
                "www.example.com. IN 60 A",
                "www.example.com. IN 60 A",
                "example.com. ANY 0 TXT",
                "example.com. IN 60 TXT",
                "old.example.com. ANY 0 CNAME",
            ]
        );
        assert_eq!(read.queries[0].query_type(), RecordType::SOA);
        let error = update_message(&dns(&[("www.other.org.", PlanRecordType::A, &[])])).unwrap_err();
        assert!(error.contains("does not lie in the zone"), "{error}");
    }

    #[test]
    fn keys_are_read_as_they_are_written() {
        let text =
            "# made\nkey \"seawall\" {\n\talgorithm hmac-sha512;\n\tsecret \"c2VjcmV0IHNlY3JldA==\";\n};\n";
        let key = key_of_text(text).unwrap();
        assert_eq!((key.signer_name().to_string().as_str(), key.key()), ("seawall.", &b"secret secret"[..]));
        let commented = "/* secret \"x\"; */ key seawall{algorithm \"hmac-sha256\";// secret \"y\";\nsecret \"//8=\";};# end";
        assert_eq!(key_of_text(commented).unwrap().key(), [255, 255]);
        assert_eq!(key_of_text(&text.replace("\"seawall\"", "\"secret\"")).unwrap().key(), b"secret secret");
        for (wrong, named) in [
            (text.replace("hmac-sha512", "hmac-md5"), "hmac-md5"),
            (text.replace("secret \"", "sceret \""), "no `secret`"),
            (text.replace("c2V", "c V"), "not base64"),
            (String::new(), "no `key`"),
        ] {
            let error = key_of_text(&wrong).err().unwrap();
            assert!(error.contains(named) && !error.contains("c2VjcmV0"), "{error}");
        }
    }
}
