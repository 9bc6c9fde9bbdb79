use std::sync::Arc;
use std::time::Duration;

use control::fleet::{
    AlertInfo, AlertKind, AlertSettings, EventInfo, Mail, MailSecurity, Page, Role, Webhook,
};
use enrol::Client;
use hyper::Method;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

use crate::console::visitor;
use crate::parts::Parts;
use crate::support::{ADMINISTRATOR, Site, on_both, problem};

on_both! { an_alert_is_told_once_and_so_is_its_end, who_is_told_is_set_by_administrators }

/// What has arrived.
type Arrived = Arc<Mutex<Vec<String>>>;

/// Takes what is posted to it; refuses the first.
async fn webhook() -> (String, Arrived) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let arrived = Arrived::default();
    let taken = arrived.clone();
    tokio::spawn(async move {
        let mut refused = false;
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut reader = BufReader::new(&mut stream);
            let (mut length, mut line) = (0, String::new());
            loop {
                line.clear();
                reader.read_line(&mut line).await.unwrap();
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                if line == "\r\n" {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).await.unwrap();
            let answer = if refused { "204 No Content" } else { "503 Service Unavailable" };
            if refused {
                taken.lock().push(String::from_utf8(body).unwrap());
            }
            refused = true;
            let answer = format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (url, arrived)
}

/// A mail server that takes everything.
async fn mail_server() -> (u16, Arrived) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let arrived = Arrived::default();
    let taken = arrived.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let taken = taken.clone();
            tokio::spawn(async move {
                let (reader, mut writer) = stream.into_split();
                let mut lines = BufReader::new(reader).lines();
                let (mut message, mut data) = (String::new(), false);
                writer.write_all(b"220 sink\r\n").await.unwrap();
                while let Ok(Some(line)) = lines.next_line().await {
                    let answer = match (data, line.as_str()) {
                        (true, ".") => {
                            data = false;
                            taken.lock().push(std::mem::take(&mut message));
                            "250 taken"
                        }
                        (true, line) => {
                            message += line;
                            message.push('\n');
                            continue;
                        }
                        (false, "DATA") => {
                            data = true;
                            "354 go on"
                        }
                        (false, line) if line.starts_with("QUIT") => "221 bye",
                        (false, _) => "250 yes",
                    };
                    if writer.write_all(format!("{answer}\r\n").as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (port, arrived)
}

async fn until(what: &str, parts: &mut Parts, found: impl AsyncFn() -> bool) {
    for _ in 0..300 {
        parts.round().await;
        if found().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    panic!("waited in vain: {what}");
}

async fn raised(client: &Client) -> Vec<AlertInfo> {
    let alerts: Vec<AlertInfo> = client.get("/alerts").await.unwrap();
    alerts.into_iter().filter(|alert| alert.cleared.is_none()).collect()
}

async fn an_alert_is_told_once_and_so_is_its_end(site: Site) {
    let client = site.administrator().await;
    let (url, posted) = webhook().await;
    let (port, mailed) = mail_server().await;
    let mut settings: AlertSettings = client.get("/settings/alerts").await.unwrap();
    settings.webhooks = vec![Webhook { url }];
    settings.mail = Some(mail(port));
    client.call::<_, Value>(Method::PUT, "/settings/alerts", Some(&settings)).await.unwrap();
    let mut parts = Parts::enrol(&site).await;
    let group = parts.protect(&client).await;
    assert!(raised(&client).await.is_empty());

    parts.age = Some(Duration::from_secs(3600));
    until("the alert is raised", &mut parts, async || !raised(&client).await.is_empty()).await;
    let alert = raised(&client).await.remove(0);
    assert_eq!((alert.kind, alert.subject.clone()), (AlertKind::PointAge, format!("groups/{}", group.id)));
    assert!(alert.message.contains("web") && alert.message.contains("60 min"), "{}", alert.message);
    until("both are told", &mut parts, async || posted.lock().len() == 1 && mailed.lock().len() == 1).await;
    let told: Value = serde_json::from_str(&posted.lock()[0]).unwrap();
    assert_eq!((&told["what"], &told["kind"]), (&json!("raised"), &json!("point-age")));
    assert_eq!(told["message"], alert.message);
    let message = mailed.lock()[0].clone();
    assert!(message.contains("To: ops@example.org") && message.contains("What to do"), "{message}");
    let page = visitor(&site, ADMINISTRATOR).await.get("/").await;
    assert!(
        page.body.contains("aria-labelledby=\"alerts\"") && page.body.contains(&alert.message),
        "{}",
        page.body
    );

    parts.age = Some(Duration::from_secs(1));
    until("it is over", &mut parts, async || raised(&client).await.is_empty()).await;
    until("both are told", &mut parts, async || posted.lock().len() == 2 && mailed.lock().len() == 2).await;
    let told: Value = serde_json::from_str(&posted.lock()[1]).unwrap();
    assert_eq!((&told["what"], &told["id"]), (&json!("cleared"), &json!(alert.id)));
    let page = visitor(&site, ADMINISTRATOR).await.get("/").await;
    assert!(!page.body.contains("aria-labelledby=\"alerts\""), "{}", page.body);
    // Once each, in the list and among the events.
    let alerts: Vec<AlertInfo> = client.get("/alerts").await.unwrap();
    assert_eq!(alerts.len(), 1);
    let events: Page<EventInfo> = client.get("/events?last=1000").await.unwrap();
    assert_eq!(events.items.iter().filter(|event| event.kind == "alert").count(), 2);
}

fn mail(port: u16) -> Mail {
    Mail {
        server: "127.0.0.1".into(),
        port,
        security: MailSecurity::None,
        user: None,
        password: None,
        from: "seawall@example.org".into(),
        to: vec!["ops@example.org".into()],
    }
}

async fn who_is_told_is_set_by_administrators(site: Site) {
    let client = site.administrator().await;
    let operator = site.make_user("olga", Role::Operator).await;
    assert_eq!(problem(client.post::<_, Value>("/alerts/test", &json!(null)).await).code, "invalid");
    let secret = "correct mail battery";
    let (port, mailed) = mail_server().await;
    let with = |password: Option<&str>, server: &str| AlertSettings {
        mail: Some(Mail {
            server: server.into(),
            user: Some("seawall".into()),
            password: password.map(str::to_owned),
            ..mail(port)
        }),
        ..AlertSettings::default()
    };
    let put = async |client: &Client, settings: AlertSettings| {
        client.call::<_, Value>(Method::PUT, "/settings/alerts", Some(&settings)).await
    };
    assert_eq!(problem(put(&operator, with(Some(secret), "127.0.0.1")).await).code, "forbidden");
    put(&client, with(Some(secret), "127.0.0.1")).await.unwrap();
    let told: Value = client.get("/settings/alerts").await.unwrap();
    assert!(told["mail"]["user"] == "seawall" && !told.to_string().contains(secret), "{told}");
    assert!(!client.get::<Value>("/audit").await.unwrap().to_string().contains(secret));
    let bad = AlertSettings { cache_used_percent: 0, ..AlertSettings::default() };
    assert_eq!(problem(put(&client, bad).await).code, "invalid");
    // A test message arrives.
    let plain = AlertSettings { mail: Some(mail(port)), ..AlertSettings::default() };
    put(&client, plain).await.unwrap();
    client.post::<_, Value>("/alerts/test", &json!(null)).await.unwrap();
    for _ in 0..200 {
        if mailed.lock().iter().any(|message| message.contains("Test message")) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the test message does not arrive: {:?}", mailed.lock());
}
