#include "limit_report.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "version.h"

#define PREFIX "$SYS/broker/fleetwright/"
/* Clients that the broker remembers, and seconds for which one is reported. */
#define MAX_CLIENTS 16
#define REPORTED_SECONDS 60
/* A client identifier has up to 255 bytes. */
#define LINE_BYTES 300

static void publish(const char *topic, const char *text)
{
	mosquitto_broker_publish_copy(NULL, topic, (int)strlen(text), text, 0, true, NULL);
}

static void describe_clients(char *text, size_t size)
{
	size_t length = 0;

	text[0] = '\0';
	for(int i = 0; i < MAX_CLIENTS; i++){
		int age = 0;
		const struct mosquitto_limit_offender *offender = mosquitto_limit_offender(i, &age);

		if(offender && age <= REPORTED_SECONDS && length + LINE_BYTES < size){
			length += (size_t)snprintf(text + length, size - length, "%s%s %s", length > 0 ? "\n" : "", offender->clientid,
				mosquitto_limit_name(offender->limit));
		}
	}
	/* An empty retained message would be no message. */
	if(length == 0){
		snprintf(text, size, "none");
	}
}

void limit_report_publish(struct limit_report *report)
{
	char text[MAX_CLIENTS * LINE_BYTES], topic[64];
	bool first = !report->clients;
	const char *name;

	describe_clients(text, sizeof(text));
	if(first || strcmp(report->clients, text)){
		publish(PREFIX "limited", text);
		free(report->clients);
		report->clients = strdup(text);
	}
	for(int limit = 0; limit < MAX_LIMITS && (name = mosquitto_limit_name(limit)); limit++){
		uint64_t count = mosquitto_limit_refusals(limit);

		if(first || report->counts[limit] != count){
			snprintf(topic, sizeof(topic), PREFIX "exceeded/%s", name);
			snprintf(text, sizeof(text), "%llu", (unsigned long long)count);
			publish(topic, text);
			report->counts[limit] = count;
		}
	}
}

void limit_report_clear(struct limit_report *report)
{
	free(report->clients);
	report->clients = NULL;
}
