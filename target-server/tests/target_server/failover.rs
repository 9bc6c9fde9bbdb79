//! While a group is failed over, nothing of its source counts: neither what it sends, nor what it asks.

use std::path::Path;

use block::{Epoch, Granule};
use changeset::{CompareAnswer, CompareQuestion, Conversation, Digester};
use control::{
    ExportInfo, ExportPlace, ExportRequest, FailoverReply, FailoverStep, OperatorRequest, PointSelector,
    StateCode,
};
use wire::{Comparison, Purpose, RefusalCode, Role, WireError, connect_for};

use crate::support::{GENERATION, GROUP, Site, VOLUME, content, epochal, key};

/// The granule at 2 MiB, which epoch 2 is the first to write.
const PLACE: Granule = Granule(32);

struct Source {
    comparison: Comparison,
    conversation: Conversation,
    asked: u64,
}

impl Source {
    async fn open(site: &Site) -> Result<Source, WireError> {
        let id = Conversation::id().unwrap();
        let connection =
            connect_for(Purpose::Compare, &site.addr(), Role::TargetServer, &site.credentials("process"))
                .await?;
        let mut comparison = Comparison::open(connection, GROUP, GENERATION, id).await?;
        comparison.turn().await?;
        let conversation = Conversation::new(&key(GROUP), GROUP, GENERATION, &id);
        Ok(Source { comparison, conversation, asked: 0 })
    }

    /// Whether the replica holds zeroes there, as the source's disk does.
    async fn ask(&mut self) -> Result<CompareAnswer, WireError> {
        self.asked += 1;
        let digester = Digester::new(&key(GROUP), GROUP, GENERATION);
        let zeroes = digester.granule(VOLUME, PLACE, &[0; 65536]);
        let digest = digester.all([zeroes].iter());
        let question = CompareQuestion::new(Epoch(3), VOLUME, [PLACE].into_iter(), digest);
        let sealed = self.conversation.seal_question(self.asked, &question);
        self.comparison.send(self.asked, sealed.into()).await?;
        let (number, message) = self.comparison.next().await?;
        Ok(self.conversation.open_answer(number, 1, &message).unwrap())
    }
}

async fn step(site: &Site, step: FailoverStep) -> FailoverReply {
    let answer = site.ask(&OperatorRequest::Failover { group: GROUP, step }).await.unwrap();
    serde_json::from_str(&answer).unwrap()
}

fn code<T>(result: Result<T, WireError>) -> RefusalCode {
    match result {
        Err(WireError::Refused { code, .. }) => code,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was answered"),
    }
}

/// A replica that holds an older state for a while must not be taken for the one that the source compares with: what would be found
/// the same could be lost when the failover is cancelled.
#[tokio::test]
async fn nothing_is_compared_with_what_a_failover_made_of_the_replica() {
    let site = Site::new().await;
    site.deliver((1..=3).map(epochal)).await;
    let mut source = Source::open(&site).await.unwrap();
    assert!(matches!(source.ask().await, Ok(CompareAnswer::Differs(_))));

    let over = step(&site, FailoverStep::Start(PointSelector::Epoch(Epoch(1)))).await;
    assert_eq!(over.point.unwrap().epoch, Epoch(4));
    assert_eq!(code(source.ask().await), RefusalCode::Busy);
    assert_eq!(code(Source::open(&site).await), RefusalCode::Busy);
    assert_eq!(code(site.sender(GROUP, GENERATION).await), RefusalCode::Busy);

    step(&site, FailoverStep::Cancel).await;
    let mut source = Source::open(&site).await.unwrap();
    assert!(matches!(source.ask().await, Ok(CompareAnswer::Differs(_))));
    site.deliver([epochal(4)]).await;

    step(&site, FailoverStep::Start(PointSelector::Latest)).await;
    step(&site, FailoverStep::Commit).await;
    assert_eq!(code(source.ask().await), RefusalCode::Generation);
    assert_eq!(code(Source::open(&site).await), RefusalCode::Generation);
    assert_eq!(code(site.sender(GROUP, GENERATION).await), RefusalCode::Generation);
}

/// A promoted group takes nothing of anybody until it is demoted; what is written to it survives the server.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_group_is_written_here_and_nowhere_else() {
    let mut site = Site::new().await;
    site.deliver((1..=3).map(epochal)).await;
    let ask = |step| OperatorRequest::Failover { group: GROUP, step };
    assert_eq!(code(site.ask(&ask(FailoverStep::Promote)).await), RefusalCode::BadRequest);
    step(&site, FailoverStep::Start(PointSelector::Epoch(Epoch(2)))).await;
    assert_eq!(code(site.ask(&ask(FailoverStep::Demote)).await), RefusalCode::BadRequest);
    for _ in 0..2 {
        assert_eq!(step(&site, FailoverStep::Promote).await.generation.0, GENERATION.0 + 1);
    }
    let socket = site.dir.path().join("promoted.sock");
    let request = ExportRequest {
        promoted: true,
        detach: true,
        ..ExportRequest::new(GROUP, Vec::new(), PointSelector::Latest, ExportPlace::Socket(socket.clone()))
    };
    let both = OperatorRequest::Export(ExportRequest { writable: true, ..request.clone() });
    assert_eq!(code(site.ask(&both).await), RefusalCode::BadRequest);
    let export = OperatorRequest::Export(request);
    let mut expected = content(2);
    for (round, place) in [(0, 4096), (1, 9 * 4096 + 5)] {
        let info: ExportInfo = serde_json::from_str(&site.ask(&export).await.unwrap()).unwrap();
        assert!(info.promoted && !info.writable);
        let byte = b'a' + round;
        if let Some(said) = write(&socket, place, byte).await {
            assert_eq!(said.trim(), "all right");
            expected[place..place + 5000].fill(byte);
        }
        assert_eq!(code(site.sender(GROUP, GENERATION).await), RefusalCode::Busy);
        assert_eq!(code(Source::open(&site).await), RefusalCode::Busy);
        let group = site.status().await.groups.into_iter().find(|group| group.group == GROUP).unwrap();
        assert_eq!((group.state, group.promoted.unwrap().open), (StateCode::Promoted, 1));
        for refused in
            [FailoverStep::Demote, FailoverStep::Cancel, FailoverStep::Start(PointSelector::Latest)]
        {
            assert_eq!(code(site.ask(&ask(refused)).await), RefusalCode::BadRequest);
        }
        if round == 0 {
            site.restart().await;
        } else {
            let stopped = site.ask(&OperatorRequest::StopExport { id: info.id }).await;
            stopped.unwrap();
        }
    }
    step(&site, FailoverStep::Demote).await;
    let group = site.status().await.groups.into_iter().find(|group| group.group == GROUP).unwrap();
    assert_eq!((group.state, group.promoted), (StateCode::FailedOver, None));
    assert!(group.failover.unwrap().written_bytes.0 > 0);
    assert!(site.view(PointSelector::Latest).await.unwrap() == expected);
    step(&site, FailoverStep::Cancel).await;
    assert!(site.view(PointSelector::Latest).await.unwrap() == content(3));
    site.deliver([epochal(4)]).await;
}

/// Writes 5000 bytes and flushes; `None` when there is no such client here.
async fn write(socket: &Path, place: usize, byte: u8) -> Option<String> {
    let uri = format!("nbd+unix:///sda?socket={}", socket.display());
    let script = format!("h.pwrite(bytes([{byte}]) * 5000, {place})\nh.flush()\nprint('all right')");
    let ran = tokio::process::Command::new("nbdsh")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .args(["-u", &uri, "-c", &script])
        .output()
        .await;
    match ran {
        Err(error) => {
            let why = format!("nbdsh (of libnbd-bin and python3-libnbd): {error}");
            eprintln!("NOT RUN: {why}");
            assert!(std::env::var_os("CI").is_none(), "it must run in CI, but: {why}");
            None
        }
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(String::from_utf8_lossy(&output.stdout).into_owned())
        }
    }
}
