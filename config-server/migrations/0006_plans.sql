-- Recovery plans: each its text as it was written. A run of a plan is a job of kind `plan`, whose subject is the plan.
CREATE TABLE plans (
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    text TEXT NOT NULL,
    changed BIGINT NOT NULL,
    changed_by TEXT NOT NULL
);

-- What people answered to steps that wait for them; `attempt` is how often the step was begun. Kept apart from the run, which only the holder of
-- its lease writes.
CREATE TABLE plan_answers (
    run_id TEXT NOT NULL REFERENCES jobs (id),
    step TEXT NOT NULL,
    attempt BIGINT NOT NULL,
    done BIGINT NOT NULL,
    note TEXT NOT NULL,
    who TEXT NOT NULL,
    time BIGINT NOT NULL,
    PRIMARY KEY (run_id, step, attempt)
);
CREATE INDEX jobs_of_subject ON jobs (subject_id, number);
