#!/bin/sh
# Tries a recovery plan out, and mails the report: monthly-drill.sh PLAN ADDRESS
#
# Nothing is failed over by a drill. Run it by a timer, as an operator who has logged in (`seawall login --scope read,operate`): on the first Sunday
# of each month with cron,
#   0 6 1-7 * *  [ "$(date +%u)" = 7 ] && /usr/local/bin/monthly-drill.sh shop ops@example.com
# Exit status 0 when every step passed, else that of `seawall plan run`. SEAWALL and SENDMAIL name the programs where they are elsewhere.
set -eu
plan=${1:?"usage: monthly-drill.sh PLAN ADDRESS"}
address=${2:?"usage: monthly-drill.sh PLAN ADDRESS"}
seawall=${SEAWALL:-seawall}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
outcome=passed
"$seawall" plan run "$plan" --mode drill --yes --watch >"$work/said" 2>&1 || status=$?
[ "$status" = 0 ] || outcome=FAILED
# A run that never began has no report; then what was said is mailed.
if "$seawall" plan report "$plan" --html "$work/report.html" >>"$work/said" 2>&1; then
    type=html body=$work/report.html
else
    type=plain body=$work/said
fi
{
    echo "To: $address"
    echo "Subject: Drill of $plan $outcome"
    echo "MIME-Version: 1.0"
    echo "Content-Type: text/$type; charset=utf-8"
    echo "Content-Transfer-Encoding: 8bit"
    echo
    cat "$body"
} | "${SENDMAIL:-/usr/sbin/sendmail}" -t
exit "$status"
