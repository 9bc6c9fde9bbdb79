//! While a group is failed over, nothing of its source counts: neither what it sends, nor what it asks.

use block::{Epoch, Granule};
use changeset::{CompareAnswer, CompareQuestion, Conversation, Digester};
use control::{FailoverReply, FailoverStep, OperatorRequest, PointSelector};
use wire::{Comparison, Purpose, RefusalCode, Role, WireError, connect_for};

use crate::support::{GENERATION, GROUP, Site, VOLUME, epochal, key};

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
