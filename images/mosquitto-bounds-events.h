/* What Mosquitto tells of its queues as they change. Part of mosquitto-bounds.c. */
#include <stdbool.h>

#include <mosquitto.h>

#include "mosquitto-bounds-unreleased.h"

/* Of a message that a client sends; the others (1) are on their way to one. */
#define INCOMING 0

static int on_stored(int event, void *event_data, void *userdata)
{
	const struct mosquitto_base_msg *message = &((struct mosquitto_evt_persist_base_msg *)event_data)->data;
	struct queues *queues = userdata;

	(void)event;
	queues->latest = (struct slot){.id = message->store_id, .bytes = message->payloadlen};
	queues->latest_fingerprint =
		message->qos == 2 ? fingerprint(message->source_id, message->topic, message->payload, message->payloadlen) : 0;
	return MOSQ_ERR_SUCCESS;
}

/* Right after the message was stored; but for those of QoS 2, which come again when their publisher releases them. */
static int on_queued(int event, void *event_data, void *userdata)
{
	const struct mosquitto_client_msg *message = &((struct mosquitto_evt_persist_client_msg *)event_data)->data;
	struct queues *queues = userdata;
	bool is_latest = queues->latest.id == message->store_id;
	uint64_t print = is_latest ? queues->latest_fingerprint : 0;
	struct slot slot = {.id = message->store_id};
	struct queue *queue;

	(void)event;
	if(is_latest){
		slot.bytes = queues->latest.bytes;
	}else if(queues->incoming.count > 0){
		slot.bytes = find(&queues->incoming, slot.id)->bytes;
	}
	if(message->direction == INCOMING){
		slot.owner = owning_session(message->clientid);
		take_in(queues, print, slot);
		return MOSQ_ERR_SUCCESS;
	}
	/* It is released: who has not got it by the end of this call does not get it. */
	if(print != 0 || queues->incoming.count > 0){
		drop_reserved(queues, slot.id);
		drop_reserved(queues, print);
	}
	queue = queue_of(queues, message->clientid, true);
	if(queue){
		put(&queue->waiting, slot);
		judge(queues, queue);
	}
	return MOSQ_ERR_SUCCESS;
}

static int on_taken(int event, void *event_data, void *userdata)
{
	const struct mosquitto_client_msg *message = &((struct mosquitto_evt_persist_client_msg *)event_data)->data;
	struct queues *queues = userdata;
	struct queue *queue;

	(void)event;
	if(message->direction == INCOMING){
		let_go(queues, message->store_id);
		return MOSQ_ERR_SUCCESS;
	}
	queue = queue_of(queues, message->clientid, false);
	if(queue){
		take_out(&queue->waiting, message->store_id);
		judge(queues, queue);
	}
	return MOSQ_ERR_SUCCESS;
}

/* Its session may outlive it. */
static int on_disconnect(int event, void *event_data, void *userdata)
{
	const struct mosquitto *connection = event == MOSQ_EVT_DISCONNECT ? ((struct mosquitto_evt_disconnect *)event_data)->client
		: ((struct mosquitto_evt_client_offline *)event_data)->client;

	drop_all_reserved(userdata, owning_connection(connection));
	return MOSQ_ERR_SUCCESS;
}

static int on_session_end(int event, void *event_data, void *userdata)
{
	const char *client = ((struct mosquitto_evt_persist_client *)event_data)->data.clientid;
	struct queues *queues = userdata;
	struct queue *queue = queue_of(queues, client, false);

	(void)event;
	let_go_all(queues, owning_session(client));
	if(queue){
		forget(queues, queue);
	}
	return MOSQ_ERR_SUCCESS;
}

static int on_subscribed(int event, void *event_data, void *userdata)
{
	const struct mosquitto_evt_persist_subscription *subscription = event_data;
	struct queue *queue = queue_of(userdata, subscription->data.clientid, true);

	(void)event;
	if(queue){
		subscribe(queue, subscription->data.topic_filter);
	}
	return MOSQ_ERR_SUCCESS;
}

static int on_unsubscribed(int event, void *event_data, void *userdata)
{
	const struct mosquitto_evt_persist_subscription *subscription = event_data;
	struct queue *queue = queue_of(userdata, subscription->data.clientid, false);

	(void)event;
	if(queue){
		unsubscribe(queue, subscription->data.topic_filter);
	}
	return MOSQ_ERR_SUCCESS;
}
