//! Answering operators: status, recovery points, the bytes of a view.

use std::pin::pin;
use std::sync::Arc;

use block::{ByteCount, ByteOffset};
use bytes::Bytes;
use control::{
    ExportsReply, OperatorRequest, PointSelector, ServerStatus, VIEW_RANGES_MAX, ViewHead, ViewRange,
    ViewTail,
};
use replica::{ReplicaError, View};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use wire::{Operation, RefusalCode, ViewWriter, WireError};

use crate::group::{point_info, summary};
use crate::hash_view::hash_view;
use crate::refusal::Refusal;
use crate::retain;
use crate::server::Server;
use crate::{ViewHash, export, failover, proof};

/// Bytes of a view read at once.
pub const VIEW_CHUNK_BYTES: ByteCount = ByteCount::mib(1);
/// Views read at the same time. A further one is refused as busy.
pub const VIEWS_MAX: usize = 16;
/// Chunks of a view that wait for the network.
const CHUNKS_QUEUED_MAX: usize = 4;
/// Zeroes within a chunk that are worth not sending.
const GAP_BYTES_MIN: usize = 64 * 1024;

/// What follows the bytes of a view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewEnd {
    /// How much was sent.
    #[serde(flatten)]
    pub tail: ViewTail,
    /// The [`ViewHash`] of it.
    pub blake3: String,
}

/// Serves one request.
pub(crate) async fn serve(server: &Arc<Server>, operation: Operation) {
    let (peer, request) = (operation.address().to_owned(), operation.request().to_owned());
    tracing::debug!(%peer, request, "operator asks");
    if let Err(error) = answer(server, operation).await {
        tracing::warn!(%peer, request, %error, "answer an operator");
    }
}

async fn answer(server: &Arc<Server>, operation: Operation) -> Result<(), WireError> {
    let request: OperatorRequest = match serde_json::from_str(operation.request()) {
        Ok(request) => request,
        Err(error) => {
            operation.refuse(RefusalCode::BadRequest, &format!("read request: {error}"));
            return Ok(());
        }
    };
    match request {
        OperatorRequest::Status => reply(operation, &ServerStatus::TargetServer(server.status())).await,
        OperatorRequest::Points { group } => match retain::points(server, group) {
            Ok(points) => reply(operation, &points).await,
            Err(refusal) => {
                operation.refuse(refusal.code, &refusal.message);
                Ok(())
            }
        },
        OperatorRequest::ReadView { group, volume, point, ranges } => {
            let read = move |view: View| {
                let parts = parts(&view, &ranges)?;
                Ok(move |chunks: &Chunks| read_view(&view, &parts, chunks))
            };
            view(server, operation, group, volume, point, read).await
        }
        OperatorRequest::HashView { group, volume, point } => {
            let hash = |view: View| Ok(move |chunks: &Chunks| hash_view(&view, chunks));
            view(server, operation, group, volume, point, hash).await
        }
        OperatorRequest::Export(request) => export::serve(server, operation, request).await,
        OperatorRequest::Exports => reply(operation, &ExportsReply { exports: server.exports.list() }).await,
        OperatorRequest::StopExport { id } => export::stop(server, operation, id).await,
        OperatorRequest::Pin { .. } | OperatorRequest::Unpin { .. } | OperatorRequest::DeletePoint { .. } => {
            retain::change(server, operation, request).await
        }
        OperatorRequest::Proven { group, epoch, volumes, took_ms } => {
            let (server, operator) = (server.clone(), operation.peer().to_string());
            let keep = move || proof::keep(&server, operator, group, epoch, &volumes, took_ms);
            let kept = tokio::task::spawn_blocking(keep).await;
            match kept.unwrap_or_else(|error| Err(Refusal::new(RefusalCode::Internal, error.to_string()))) {
                Ok(json) => operation.reply(&json).await,
                Err(refusal) => {
                    operation.refuse(refusal.code, &refusal.message);
                    Ok(())
                }
            }
        }
        OperatorRequest::Failover { group, step } => failover::serve(server, operation, group, step).await,
        OperatorRequest::Scrub { group, volume } => retain::scrub(server, operation, group, volume).await,
    }
}

/// Where the parts of an answer go.
pub(crate) type Chunks = mpsc::Sender<(ByteOffset, Bytes)>;

/// Opens a view and answers with what `prepare` makes of it.
async fn view<P, S>(
    server: &Arc<Server>,
    operation: Operation,
    group: block::GroupId,
    volume: block::VolumeId,
    point: PointSelector,
    prepare: P,
) -> Result<(), WireError>
where
    P: FnOnce(View) -> Result<S, Refusal> + Send + 'static,
    S: FnOnce(&Chunks) -> Result<(), ReplicaError> + Send + 'static,
{
    let Ok(_permit) = server.views.try_acquire() else {
        let message = format!("read a view: {VIEWS_MAX} are being read already; try again later");
        operation.refuse(RefusalCode::Busy, &message);
        return Ok(());
    };
    let opener = server.clone();
    let open = move || {
        let (head, view) = open_view(&opener, group, volume, point)?;
        Ok((head, prepare(view)?))
    };
    let opened = tokio::task::spawn_blocking(open).await;
    match opened.unwrap_or_else(|error| Err(Refusal::new(RefusalCode::Internal, error.to_string()))) {
        Ok((head, source)) => {
            let writer = operation.stream(&json(&head)).await?;
            stream(server, writer, source).await
        }
        Err(refusal) => {
            operation.refuse(refusal.code, &refusal.message);
            Ok(())
        }
    }
}

pub(crate) async fn reply<T: Serialize>(operation: Operation, value: &T) -> Result<(), WireError> {
    operation.reply(&json(value)).await
}

pub(crate) fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("a status has string keys only")
}

pub(crate) fn unknown(group: block::GroupId) -> Refusal {
    Refusal::new(
        RefusalCode::UnknownGroup,
        format!("look up group {group}: this target server does not keep it"),
    )
}

pub(crate) fn open_view(
    server: &Server,
    group: block::GroupId,
    volume: block::VolumeId,
    selector: PointSelector,
) -> Result<(ViewHead, View), Refusal> {
    let group = server.group(group).ok_or_else(|| unknown(group))?;
    let replica = group.replica()?;
    loop {
        let epoch = retain::epoch_of(replica, selector)?;
        let opened = replica.point(epoch).and_then(|point| Ok((replica.view(volume, epoch)?, point)));
        let (view, point) = match opened {
            // Dropped since: the newest is another one now.
            Err(ReplicaError::NoSuchPoint { .. }) if !matches!(selector, PointSelector::Epoch(_)) => continue,
            other => other?,
        };
        let info = point.volumes.iter().find(|info| info.id == volume);
        let info = info.ok_or_else(|| Refusal::new(RefusalCode::NotFound, "the point has no such volume"))?;
        return Ok((ViewHead { group: group.id, volume: summary(info), point: point_info(&point) }, view));
    }
}

/// Sends what `source` gives. Reading and sending go on at the same time.
async fn stream<S>(server: &Server, mut writer: ViewWriter, source: S) -> Result<(), WireError>
where
    S: FnOnce(&Chunks) -> Result<(), ReplicaError> + Send + 'static,
{
    let (chunks, mut read) = mpsc::channel(CHUNKS_QUEUED_MAX);
    // Ends by itself when nobody takes the chunks any more.
    let reader = tokio::task::spawn_blocking(move || source(&chunks));
    let mut stopping = pin!(server.stopping());
    let (mut hash, mut sent) = (ViewHash::new(), ByteCount::ZERO);
    loop {
        let chunk = tokio::select! {
            chunk = read.recv() => chunk,
            () = &mut stopping => {
                writer.refuse(RefusalCode::Stopping, "read a view: this target server is stopping");
                return Ok(());
            }
        };
        let Some((offset, bytes)) = chunk else { break };
        hash.update(offset, &bytes);
        sent += ByteCount(bytes.len() as u64);
        tokio::select! {
            sent = writer.data(offset, bytes) => sent?,
            () = &mut stopping => {
                writer.refuse(RefusalCode::Stopping, "read a view: this target server is stopping");
                return Ok(());
            }
        }
    }
    match reader.await {
        Ok(Ok(())) => {
            let end = ViewEnd { tail: ViewTail { sent_bytes: sent }, blake3: hash.finish() };
            writer.finish(&json(&end)).await
        }
        Ok(Err(error)) => {
            tracing::error!(%error, "read a view");
            writer.refuse(
                Refusal::from(error).code,
                "read a view: the replica cannot be read; see the target's log",
            );
            Ok(())
        }
        Err(error) => {
            tracing::error!(%error, "read a view");
            writer.refuse(RefusalCode::Internal, "read a view: reading ended half-way; see the target's log");
            Ok(())
        }
    }
}

/// What is to be read of a view: the ranges asked for, or all of it.
fn parts(view: &View, ranges: &[ViewRange]) -> Result<Vec<std::ops::Range<u64>>, Refusal> {
    let refuse = |message: String| Err(Refusal::new(RefusalCode::BadRequest, message));
    if ranges.len() > VIEW_RANGES_MAX {
        return refuse(format!(
            "read {} parts of a view: at most {VIEW_RANGES_MAX} go at once",
            ranges.len()
        ));
    }
    let mut parts = Vec::with_capacity(ranges.len().max(1));
    let mut last = 0;
    for range in ranges {
        let end = range.offset.checked_add(range.length).map_or(u64::MAX, ByteOffset::get);
        if range.offset.0 < last || end > view.size().0 {
            return refuse(format!(
                "read {} at {} of a view of {}: past its end, or out of order",
                range.length,
                range.offset,
                view.size()
            ));
        }
        parts.push(range.offset.0..end);
        last = end;
    }
    if ranges.is_empty() {
        parts.push(0..view.size().0);
    }
    Ok(parts)
}

/// Gives all of the parts that is not zeroes.
fn read_view(view: &View, parts: &[std::ops::Range<u64>], chunks: &Chunks) -> Result<(), ReplicaError> {
    for range in parts {
        let mut at = range.start;
        while at < range.end {
            let Some(extent) = view.next_data(ByteOffset(at))? else { break };
            let (mut offset, end) = (extent.offset().0.max(at), extent.end().0.min(range.end));
            while offset < end {
                let length = (end - offset).min(VIEW_CHUNK_BYTES.0);
                let mut chunk = vec![0; length as usize];
                view.read_at(&mut chunk, ByteOffset(offset))?;
                let chunk = Bytes::from(chunk);
                for part in without_zeroes(&chunk) {
                    let place = ByteOffset(offset + part.start as u64);
                    if chunks.blocking_send((place, chunk.slice(part))).is_err() {
                        // Nobody wants it any more.
                        return Ok(());
                    }
                }
                offset += length;
            }
            at = end.max(at + 1);
        }
    }
    Ok(())
}

/// The parts of a chunk that are to be sent: all but long stretches of zeroes.
fn without_zeroes(chunk: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut parts: Vec<std::ops::Range<usize>> = Vec::new();
    let mut at = 0;
    for block in chunk.chunks(block::BLOCK_BYTES as usize) {
        let end = at + block.len();
        if block.iter().any(|byte| *byte != 0) {
            match parts.last_mut() {
                Some(last) if at - last.end < GAP_BYTES_MIN => last.end = end,
                _ => parts.push(at..end),
            }
        }
        at = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_zeroes_are_not_sent_and_short_ones_are() {
        const KIB: usize = 1024;
        let mut chunk = vec![0; 1024 * KIB];
        assert!(without_zeroes(&chunk).is_empty());
        chunk[8 * KIB + 5] = 1;
        chunk[20 * KIB] = 1;
        chunk[200 * KIB] = 1;
        chunk[1024 * KIB - 1] = 1;
        let expected = [8 * KIB..24 * KIB, 200 * KIB..204 * KIB, 1020 * KIB..1024 * KIB];
        assert_eq!(without_zeroes(&chunk), expected);
        assert_eq!(without_zeroes(&[1; 512]), vec![0..512; 1]);
    }

    /// `seawall restore` compares these; other fields may be added, never renamed.
    #[test]
    fn the_end_of_a_view_is_a_tail_with_its_hash() {
        let end = ViewEnd { tail: ViewTail { sent_bytes: ByteCount(5) }, blake3: "ab".to_owned() };
        let text = json(&end);
        assert_eq!(text, r#"{"sent_bytes":5,"blake3":"ab"}"#);
        assert_eq!(serde_json::from_str::<ViewTail>(&text).unwrap(), end.tail);
    }
}
