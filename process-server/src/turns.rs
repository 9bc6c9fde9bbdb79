//! Whose turn it is to compare: first come, first served, so many at a time.
//!
//! Cancellation: a place in the queue and a turn end when dropped.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::watch;
use wire::Turn;

/// Groups that wait or compare.
#[derive(Clone)]
pub(crate) struct Turns {
    at_once: u32,
    queue: Arc<watch::Sender<Queue>>,
}

#[derive(Default)]
struct Queue {
    next: u64,
    running: Vec<u64>,
    waiting: VecDeque<u64>,
}

impl Queue {
    /// Lets in whom there is room for; whether anyone came in.
    fn admit(&mut self, at_once: u32) {
        while self.running.len() < at_once as usize
            && let Some(number) = self.waiting.pop_front()
        {
            self.running.push(number);
        }
    }

    /// How many are before a place; 0 for one that has its turn.
    fn ahead(&self, number: u64) -> u32 {
        let waiting = self.waiting.iter().position(|waiting| *waiting == number);
        waiting.map_or(0, |before| (self.running.len() + before) as u32)
    }
}

/// A place in the queue, and then a turn.
pub(crate) struct Place {
    turns: Turns,
    number: u64,
    news: watch::Receiver<Queue>,
}

impl Turns {
    pub(crate) fn new(at_once: u32) -> Turns {
        Turns { at_once, queue: Arc::new(watch::Sender::new(Queue::default())) }
    }

    /// How many may compare at a time.
    pub(crate) fn at_once(&self) -> u32 {
        self.at_once
    }

    /// The last place in the queue.
    pub(crate) fn enter(&self) -> Place {
        let news = self.queue.subscribe();
        let mut number = 0;
        self.queue.send_modify(|queue| {
            number = queue.next;
            queue.next += 1;
            queue.waiting.push_back(number);
            queue.admit(self.at_once);
        });
        Place { turns: self.clone(), number, news }
    }

    /// How many compare, and how many wait.
    pub(crate) fn count(&self) -> (usize, usize) {
        let queue = self.queue.borrow();
        (queue.running.len(), queue.waiting.len())
    }
}

impl Place {
    /// Where it is in the queue now.
    pub(crate) fn turn(&mut self) -> Turn {
        Turn { ahead: self.news.borrow_and_update().ahead(self.number), at_once: self.turns.at_once }
    }

    /// Waits until the queue has moved.
    pub(crate) async fn moved(&mut self) {
        // The sender lives as long as this place.
        let _ = self.news.changed().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.turns.queue.send_modify(|queue| {
            queue.running.retain(|number| *number != self.number);
            queue.waiting.retain(|number| *number != self.number);
            queue.admit(self.turns.at_once);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ahead(places: &mut [Place]) -> Vec<u32> {
        places.iter_mut().map(|place| place.turn().ahead).collect()
    }

    #[test]
    fn first_come_first_served_and_so_many_at_a_time() {
        let turns = Turns::new(2);
        let mut places: Vec<Place> = (0..5).map(|_| turns.enter()).collect();
        assert_eq!((ahead(&mut places), turns.count()), (vec![0, 0, 2, 3, 4], (2, 3)));
        // One that waits gives up; one that compares ends.
        drop(places.remove(3));
        assert_eq!(ahead(&mut places), [0, 0, 2, 3]);
        drop(places.remove(0));
        assert_eq!((ahead(&mut places), turns.count()), (vec![0, 0, 2], (2, 1)));
        places.push(turns.enter());
        assert_eq!(ahead(&mut places), [0, 0, 2, 3]);
        places.clear();
        assert_eq!(turns.count(), (0, 0));
    }

    #[tokio::test]
    async fn who_waits_hears_of_its_turn() {
        let turns = Turns::new(1);
        let first = turns.enter();
        let mut second = turns.enter();
        assert_eq!(second.turn(), Turn { ahead: 1, at_once: 1 });
        let waiting = tokio::spawn(async move {
            while second.turn().ahead > 0 {
                second.moved().await;
            }
        });
        drop(first);
        waiting.await.unwrap();
    }
}
